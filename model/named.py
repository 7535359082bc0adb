"""Classes named by import path, looked up in the source: importing torch takes seconds that a plan should not."""

import ast
import difflib
import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path

from model.errors import ModelError


def check_named(path: str, setting: str) -> None:
    """Raises ModelError when the module of MODULE.NAME is not there, or has no such name."""
    module, _, name = path.rpartition(".")
    source = find_source(module)
    if source is None:
        raise ModelError(f"{setting}={path}: there is no module {module} here; it may lie beside where you run")
    known = names_in(source)
    if known and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ModelError(f"{setting}={path}: {source} has no {name}." + (f" Did you mean {near[0]}?" if near else ""))


def find_source(module: str) -> Path | None:
    """The file of a module, which is not imported, nor are the packages it lies in."""
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
    """What a module defines or imports; empty where that cannot be told from the source."""
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
