"""Cache keys: what an artifact is, as sixteen hex digits, and why two of them differ.

key = sha256 of canonical JSON {module, params, inputs, identity, code}. Paths, hosts, devices, process counts, loggers
and library versions never enter; the code that makes the artifact does, as syntax trees.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

RESULT_NEUTRAL = "names artifacts; makes nothing"

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "pyproject.toml").is_file()  # else installed among other packages
Code = dict[str, dict[str, str]]  # module -> top-level definition (or "" for the rest) -> digest of its syntax tree


def stage_key(module: str, params: Any, inputs: dict[str, str], identity: Any, code: Code) -> str:
    """16 hex digits that name the artifact `module` makes of these. `params` must be canonical (see `canonical`)."""
    content = {
        "module": module,
        "params": params,
        "inputs": inputs,
        "identity": identity,
        "code": {name: digest(parts) for name, parts in code.items()},
    }
    return digest(content)


def digest(value: Any) -> str:
    """First 16 hex digits of the sha256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: Any, file_digest: Callable[[str], str], where: str = "params") -> Any:
    """A typed parameter tree as JSON values.

    A dataclass field marked {"file": True} becomes its content's sha256; one marked {"key": False} stays out.

    Raises UserError for a value that has no stable form (NaN, sets, objects).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.metadata.get("key") is False:
                continue  # says where something is, not what
            if field.metadata.get("file") and item is not None:
                try:
                    result[field.name] = {"sha256": file_digest(item)}
                except UserError as error:
                    raise UserError(str(error), f"{where}.{field.name}") from None
            else:
                result[field.name] = canonical(item, file_digest, f"{where}.{field.name}")
        return result
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise UserError("has a name that is not text", where)
        return {name: canonical(item, file_digest, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item, file_digest, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"is {value}, which cannot name an artifact", where)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"is a {type(value).__name__}, which cannot name an artifact", where)


def code_of(module: str, params: Any = None) -> Code:
    """The syntax trees that making an artifact runs: `module`, what it imports, and modules that `params` name.

    Only the project's own modules and those beside the user's configs count; a module that declares RESULT_NEUTRAL
    does not, nor does what only it imports.
    """
    found: Code = {}
    waiting = [module, *named_modules(params)]
    while waiting:
        name = waiting.pop()
        path = find_module(name)
        if name in found or path is None:
            continue
        parts, imports, neutral = _read(path, path.stat().st_mtime_ns, name)
        if neutral:
            continue
        found[name] = parts
        waiting += imports
    return {name: parts for name, parts in sorted(found.items()) if parts}


def named_modules(params: Any) -> list[str]:
    """Project modules that text in `params` names as an import path (a task's class, an optimiser, a model)."""
    names = []
    for text in _texts(params):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text):
            names += _module_prefixes(text)[-1:]
    return names


def find_module(name: str) -> Path | None:
    """The source file of a module of the project or of the user's own import path; None for anything installed."""
    relative = Path(*name.split("."))
    for root in _roots(os.getcwd(), *sys.path):
        for candidate in (root / relative.with_suffix(".py"), root / relative / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@functools.lru_cache(maxsize=8)
def _roots(here: str, *import_path: str) -> list[Path]:
    own = [Path(here, entry).resolve() for entry in import_path]
    installed = ("site-packages", "dist-packages", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return [ROOT, *(p for p in own if p != ROOT and not any(part in installed for part in p.parts))]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _module_prefixes(dotted: str) -> list[str]:
    """The prefixes of `dotted` that are project modules, shortest first."""
    parts = dotted.split(".")
    return [name for i in range(1, len(parts) + 1) if find_module(name := ".".join(parts[:i])) is not None]


@functools.lru_cache(maxsize=512)
def _read(path: Path, _mtime_ns: int, name: str) -> tuple[dict[str, str], tuple[str, ...], bool]:
    """Digests by top-level definition, project modules imported anywhere, and whether the module is neutral."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"does not parse: {error.msg}", f"{path}:{error.lineno}") from None
    neutral = any(
        isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RESULT_NEUTRAL" for node in tree.body
    )
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _digests(tree), tuple(sorted(set(_imports(tree, package)))), neutral


def _digests(tree: ast.Module) -> dict[str, str]:
    groups: dict[str, list[str]] = {}
    for node in tree.body:
        if _is_docstring(node) or _only_for_types(node):
            continue
        defines = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        groups.setdefault(node.name if defines else "", []).append(serialise(node))  # type: ignore[attr-defined]
    return {name: digest(texts) for name, texts in groups.items()}


def serialise(node: Any) -> str:
    """A syntax tree as text: node types and non-empty fields by name; no positions, docstrings or contexts.

    The same on Python 3.11 to 3.13, whose own `ast.dump` is not.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if name in ("ctx", "kind", "type_comment") or (value is None and not isinstance(node, ast.Constant)):
                continue
            if name == "body" and isinstance(value, list):
                value = [item for item in value if not _is_docstring(item)]
            if isinstance(node, ast.JoinedStr) and isinstance(
                value, list
            ):  # Python 3.12.0 and 3.12.1 end some format specs with an empty text
                value = [item for item in value if getattr(item, "value", None) != ""]
            if value != []:
                fields.append(f"{name}={serialise(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ",".join(serialise(item) for item in node if not _only_for_types(item)) + "]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _only_for_types(node: Any) -> bool:
    if not isinstance(node, ast.If):
        return False
    return getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    """Project modules that the tree imports, functions included, TYPE_CHECKING blocks not."""
    if _only_for_types(node):
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _module_prefixes(alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        yield from _module_prefixes(base)
        for alias in node.names:
            if find_module(f"{base}.{alias.name}"):
                yield f"{base}.{alias.name}"
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two artifact descriptions {params, inputs, identity, code}, one line a thing."""
    lines = [f"{path} {_show(a)} -> {_show(b)}" for path, a, b in _changed(old.get("params"), new.get("params"), "")]
    for name in sorted({*old["inputs"], *new["inputs"]}):
        a, b = old["inputs"].get(name), new["inputs"].get(name)
        if a != b:
            lines.append(f"input {name} {a or 'none'} -> {b or 'none'}")
    if old.get("identity") != new.get("identity"):
        lines.append("the data behind it changed")
    return lines + [f"code: {change}" for change in code_changes(old.get("code", {}), new.get("code", {}))]


def code_changes(old: Code, new: Code) -> list[str]:
    """Changed modules with the functions and classes that changed in them."""
    lines = []
    for module in sorted({*old, *new}):
        a, b = old.get(module), new.get(module)
        if a == b:
            continue
        if a is None or b is None:
            lines.append(f"{module} ({'now' if a is None else 'no longer'} imported)")
            continue
        names = sorted(name or "module level" for name in {*a, *b} if a.get(name) != b.get(name))
        lines.append(f"{module} ({', '.join(names)})")
    return lines


def _changed(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if old == new and type(old) is type(new):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _changed(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from _changed(a, b, f"{path}[{i}]")
    else:
        yield path, old, new


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
