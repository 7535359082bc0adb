"""Text that may contain half of a surrogate pair, which is not a character: one rule for all who read it."""

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
    """The same for every text in a JSON value, names included."""
    if isinstance(value, str):
        return whole(value, notes)
    if isinstance(value, list):
        return [whole_all(item, notes) for item in value]
    if isinstance(value, dict):
        return {whole(name, notes): whole_all(item, notes) for name, item in value.items()}
    return value


def decoded(value: Any) -> Any:
    """The value with its encoded texts decoded, also in lists and objects. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return whole(decode(value))
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: decoded(item) for name, item in value.items()}
    return value


def counted(notes: dict[str, int]) -> str:
    """A reader's notes with their counts, on one line; empty if there are none."""
    return ", ".join(f"{what}: {number:,}" for what, number in notes.items() if number)


def decode(content: bytes) -> str:
    """Decode UTF-8 that may also encode halves of surrogate pairs. Raises UnicodeDecodeError for anything else."""
    return content.decode("utf-8", "surrogatepass")
