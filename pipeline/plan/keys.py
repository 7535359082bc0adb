"""Cache keys: what an artifact is, as sixteen hex digits, and why two of them differ.

key = sha256 of canonical JSON {format, module, params, inputs, identity, code}. Paths, hosts, devices, process counts,
loggers and library versions never enter; the code that makes the artifact does (see pipeline/plan/code.py).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts.artifact import FORMAT
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = (ROOT / "pyproject.toml").is_file()  # else installed among other packages
Parts = dict[str, dict[str, str]]  # module -> definition ("" for what it does when imported) -> digest


def stage_key(module: str, params: Any, inputs: dict[str, str], identity: Any, code: str) -> str:
    """16 hex digits that name the artifact `module` makes of these.

    params: canonical (see `canonical`). code: digest of the code that is executed (pipeline/plan/code.py).
    """
    content = {"module": module, "params": params, "inputs": inputs, "identity": identity, "code": code}
    return digest({"format": FORMAT, **content})


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


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two artifact descriptions {params, inputs, identity, code}, one line each."""
    lines = [f"{path} {_show(a)} -> {_show(b)}" for path, a, b in _changed(old.get("params"), new.get("params"), "")]
    for name in sorted({*old["inputs"], *new["inputs"]}):
        a, b = old["inputs"].get(name), new["inputs"].get(name)
        if a != b:
            lines.append(f"input {name} {a or 'none'} -> {b or 'none'}")
    if old.get("identity") != new.get("identity"):
        lines.append("the data behind it changed")
    return lines + [f"code: {change}" for change in code_changes(old.get("code", {}), new.get("code", {}))]


def code_changes(old: Parts, new: Parts) -> list[str]:
    """Definitions that changed, by module. One that only moved to another module has not changed."""
    before, after = _located(old), _located(new)
    changed: dict[str, set[str]] = {}
    for found, other in ((before, after), (after, before)):
        for content in found.keys() - other.keys():
            for module, name in found[content]:
                changed.setdefault(module, set()).add(name or "module level")
    return [f"{module} ({', '.join(sorted(names))})" for module, names in sorted(changed.items())]


def _located(parts: Parts) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Where each definition is, by its name and digest."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for module, definitions in parts.items():
        for name, content in definitions.items():
            found.setdefault((name, content), []).append((module, name))
    return found


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
