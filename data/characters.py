"""Text that may hold half a surrogate pair, which is no character: one rule for all readers of text from outside."""

import re
from collections import Counter
from typing import Any

HALF = re.compile("[\ud800-\udfff]")
HALVES = "halves of surrogate pairs replaced by U+FFFD"


def whole(text: str, notes: Counter[str] | None = None) -> str:
    """`text` with U+FFFD in place of each half of a surrogate pair, counted in `notes`."""
    text, found = HALF.subn("\ufffd", text)
    if found and notes is not None:
        notes[HALVES] += found
    return text


def whole_all(value: Any, notes: Counter[str]) -> Any:
    """The same of every text in a JSON value, names in it included."""
    if isinstance(value, str):
        return whole(value, notes)
    if isinstance(value, list):
        return [whole_all(item, notes) for item in value]
    if isinstance(value, dict):
        return {whole(name, notes): whole_all(item, notes) for name, item in value.items()}
    return value


def decoded(value: Any) -> Any:
    """A value whose texts are still encoded, lists and objects of such included. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return whole(decode(value))
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: decoded(item) for name, item in value.items()}
    return value


def counted(notes: dict[str, int]) -> str:
    """What a reader noted and how often, for one line; empty where it noted nothing."""
    return ", ".join(f"{what}: {number:,}" for what, number in notes.items() if number)


def decode(content: bytes) -> str:
    """UTF-8 in which halves of surrogate pairs may be encoded, too. Raises UnicodeDecodeError for anything else."""
    return content.decode("utf-8", "surrogatepass")
