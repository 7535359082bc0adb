"""Quoting of settings as people type them, where Hydra's grammar would not read them as they are meant."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

TEXTS_OF_STAGES = (".pin", ".params.init", ".params.title")  # of any stage; 1234 is text there too


def quoted(override: str, texts: dict[str, type]) -> str:
    """NAME=VALUE, quoted where needed. texts: settings that are text (str) or a list of texts (list), by name."""
    name, given, value = override.partition("=")
    bare = name.lstrip("+")
    if not given or not re.fullmatch(r"\+{0,2}[\w./@:-]+", name):
        return override
    kind = str if bare.endswith(TEXTS_OF_STAGES) else texts.get(bare)
    found = parsed_override(override)
    if found is not None:
        plain = found.value() if not found.is_sweep_override() else ""
        if kind is str and not (plain is None or _is_text(plain)):
            return f"{name}={quote(value)}"
        if not (kind is list and isinstance(plain, list) and not all(map(_is_text, plain))):
            return override
    inner = value.strip()
    if kind is str or inner[:1] not in ("[", "{"):
        return f"{name}={quote(value)}"
    listed = f"{name}={_value(inner, kind is list)}"
    return listed if inner[-1:] in ("]", "}") and parsed_override(listed) is not None else override


def quote(text: str) -> str:
    """`text` between quotes; backslashes count only in front of one."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def chosen(overrides: list[str], *names: str) -> bool:
    """Return True if the command line sets one of the settings, given as `NAME=`."""
    return any(override.lstrip("+~").startswith(names) for override in overrides)


def texts_in(cls: Any, path: str = "") -> Iterator[tuple[str, type]]:
    """Names of the settings of a dataclass that are text, or lists of it, those of its groups included."""
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if dataclasses.is_dataclass(hint):
            yield from texts_in(hint, f"{path}{name}.")
        elif str in options:
            yield path + name, str
        elif list[str] in options:
            yield path + name, list


def _is_text(value: Any) -> bool:
    return isinstance(value, str)  # what Hydra keeps with its quotes is one as well


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def parsed_override(override: str) -> Any:
    """Hydra's reading of an override; None where it has none."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(override)
    except HydraException:
        return None


def _value(value: str, texts: bool = False) -> str:
    """A list or group with what Hydra cannot read in it quoted; texts: each item of the list is text."""
    if value[:1] == "[" and value[-1:] == "]":
        return f"[{','.join(_item(item, texts) for item in _items(value[1:-1]))}]"
    if value[:1] == "{" and value[-1:] == "}":
        pairs = (item.partition(":") for item in _items(value[1:-1]))
        return f"{{{','.join(f'{name.strip()}: {_item(inner)}' for name, _, inner in pairs)}}}"
    return quote(value)


def _item(item: str, text: bool = False) -> str:
    item = item.strip()
    found = parsed_override(f"x={item}")
    if found is not None and not found.is_sweep_override() and (not text or _is_text(found.value())):
        return item
    return quote(item) if text else _value(item)


def _items(inner: str) -> Iterator[str]:
    """The parts of a list, split at commas outside quotes and brackets.

    A quote counts only where a value begins with it: elsewhere it is an apostrophe.
    """
    start, depth, mark = 0, 0, ""
    for at, letter in enumerate(inner):
        if mark:
            mark = "" if letter == mark and inner[at - 1] != "\\" else mark
        elif letter in "\"'" and inner[:at].rstrip()[-1:] in ("", ",", "[", "{", ":"):
            mark = letter
        elif letter in "[]{}":
            depth += 1 if letter in "[{" else -1
        elif letter == "," and depth == 0:
            yield inner[start:at]
            start = at + 1
    if inner.strip():
        yield inner[start:]
