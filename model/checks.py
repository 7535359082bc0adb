"""What a setting may be: numbers within bounds, and classes named by import path.

Standard library only: plans are made without torch.
"""

import ast
import difflib
import importlib.util
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Literal

from model.errors import ModelError


@dataclass(frozen=True)
class From:
    """The smallest value that a number may have, or the one that it must exceed; `below`: what it must not reach."""

    limit: int
    included: bool = True
    below: int | None = None

    def holds(self, number: float) -> bool:
        enough = number >= self.limit if self.included else number > self.limit
        return enough and (self.below is None or number < self.below)

    def __str__(self) -> str:
        least = f"from {self.limit} on" if self.included else f"above {self.limit}"
        return least if self.below is None else f"{least} and below {self.below}"


@dataclass(frozen=True)
class ZeroIsOff:
    """Marks a number that may be null, which switches something off. 0 counts as null."""


# Every number in the settings has one of these types. 0 is refused where it makes no sense, and switches off what null
# switches off. NaN and infinity are always refused.
Count = Annotated[int, From(1)]
Natural = Annotated[int, From(0)]
Amount = Annotated[float, From(0)]
Positive = Annotated[float, From(0, included=False)]
Fraction = Annotated[float, From(0, included=False, below=1)]
Part = Annotated[float, From(0, below=1)]
Seed = Annotated[int, From(0, below=1 << 63)]
CountOrOff = Annotated[Count | None, ZeroIsOff()]
PositiveOrOff = Annotated[Positive | None, ZeroIsOff()]
FactorOrOff = Annotated[Annotated[float, From(1, included=False)] | None, ZeroIsOff()]
Dtype = Literal["auto", "bfloat16", "float32", "float16"]


def check_named(path: str, setting: str) -> None:
    """Raises ModelError when the module of MODULE.NAME is not there, or has no such name.

    The class is looked up in the source, since importing torch takes seconds that a plan should not.
    """
    module, _, name = path.rpartition(".")
    source = find_source(module)
    if source is None:
        raise ModelError(f"{setting}={path}: there is no module {module}; it may be in the directory that you run in")
    known = names_in(source)
    if known and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ModelError(f"{setting}={path}: {source} has no {name}." + (f" Did you mean {near[0]}?" if near else ""))


def find_source(module: str) -> Path | None:
    """The file of a module. Neither the module nor the packages around it are imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for name in rest:
        folders = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(name, folders) if folders else None
    return Path(spec.origin) if spec and spec.origin else None


def names_in(source: Path) -> set[str]:
    """Names that a module defines or imports; empty where the source does not tell."""
    if source.suffix != ".py":
        return set()
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (OSError, SyntaxError):
        return set()
    imported = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    if any(alias.name == "*" for alias in imported):
        return set()
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if "__getattr__" in defined:
        return set()
    return defined | assigned | {alias.asname or alias.name for alias in imported}
