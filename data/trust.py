"""Checks of foreign input: names, digests and sizes that a server, an archive or a manifest announces, and text that is
printed."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import DataError, DataMistake

SHA256 = re.compile(r"[0-9a-f]{64}")
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which is not a character
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # bidirectional overrides included
LARGEST = 1e15  # above all times in seconds and sizes in bytes
LONGEST_NAME = 1024  # characters of a path


def check_name(name: Any, where: str) -> str:
    """Return `name` if it is a relative path of plain parts, in POSIX notation. where: who announced it.

    Raises DataError for anything that could leave the directory it is joined to, or hide what it is: `..`, `.`, empty
    parts, a leading `/`, a backslash, control characters, half a surrogate pair.
    """
    wrong = (
        not isinstance(name, str)
        or len(name) > LONGEST_NAME
        or "\\" in name
        or CONTROL.search(name)
        or HALF.search(name)
        or any(part in ("", ".", "..") for part in name.split("/"))
    )
    if wrong:
        raise DataError(f"{where} lists a file named {shown(name)}, which is not a plain relative path. Refused.")
    return str(name)


def below(folder: Path, name: Any, where: str) -> Path:
    """`folder`/`name`, once `name` has been checked. Raises DataError."""
    return folder / check_name(name, where)


def is_sha256(value: Any) -> bool:
    """Return True for 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def check_sha256(value: Any, where: str) -> str:
    """Return `value` if it is a SHA-256 in hexadecimal. Raises DataError."""
    if not is_sha256(value):
        raise DataError(f"{where} announces {shown(value)} as a SHA-256, expected 64 hexadecimal digits. Refused.")
    return str(value)


def is_size(value: Any) -> bool:
    """Return True for a whole number of bytes, zero or more."""
    return type(value) is int and value >= 0


def check_size(value: Any, where: str) -> int:
    """Return `value` if it is a whole number of bytes. Raises DataError."""
    if not is_size(value):
        raise DataError(f"{where} announces a size of {shown(value)}, expected a whole number of bytes. Refused.")
    return int(value)


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an http or https URL. Raises DataMistake."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if parts.hostname:
            return parts.scheme, parts.hostname, port
    except (ValueError, KeyError):
        pass
    raise DataMistake(f"{url!r} is not a URL. Give one such as https://huggingface.co.")


def described(value: Any) -> bool:
    """Return True for {"sha256", "bytes"} of a file, as a store remembers it."""
    return isinstance(value, dict) and is_sha256(value.get("sha256")) and is_size(value.get("bytes"))


def group(memory: dict[str, Any], name: str) -> dict[str, Any]:
    """memory[name], to be changed in place; a new dict if there is none."""
    if not isinstance(memory.get(name), dict):
        memory[name] = {}
    return memory[name]


def fits(value: Any, usual: Any) -> bool:
    """Return True if `value` has the type that `usual` has: a number, text, a list or an object like it.

    Numbers must be finite and below LARGEST. An object must have the names of `usual` with values that fit, and may
    have more.
    """
    if isinstance(usual, float):
        return type(value) in (int, float) and abs(value) < LARGEST  # NaN is not, either
    if isinstance(usual, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], usual[name]) for name in usual)
    return type(value) is type(usual)


def shown(value: Any) -> str:
    """A foreign value for a message: as Python writes it, in ASCII, at most 100 characters."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with control characters made visible, so that no terminal obeys them; those in `keep` stay.

    ESC becomes U+241B, other C0 characters their symbol in Unicode's Control Pictures block, the rest U+FFFD.
    """

    def picture(found: re.Match[str]) -> str:
        if found[0] in keep:
            return found[0]
        code = ord(found[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return CONTROL.sub(picture, text)
