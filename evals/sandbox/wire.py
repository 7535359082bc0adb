"""Messages between the processes of a sandbox: frames of JSON, and in them plain Python values.

A reader never unpickles, calls or looks up anything by a name that it received, and `unpack` returns only objects whose
type is exactly a built-in one: none has methods of the sender's.
"""

import json
import os
import struct
from typing import Any

FRAME_BYTES = 64 << 20  # between our own processes
REPLY_BYTES = 1 << 20  # from the process that runs the answer
_DEPTH = 64
_TAGGED = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Lost(BaseException):
    """The other end has closed the connection."""


class NotPlain(BaseException):
    """A value that is not a literal, or one that is too large or too deep. `except Exception` does not catch it."""


def pack(value: Any, depth: int = _DEPTH) -> Any:
    """`value` in JSON's types. Raises NotPlain. A subclass of a built-in type becomes that type."""
    if depth == 0:
        raise NotPlain("a value is nested too deeply")
    if value is None or isinstance(value, bool | int | float | str):
        return value  # json writes a subclass as its base
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, dict):
        return {"dict": [[pack(key, depth - 1), pack(item, depth - 1)] for key, item in value.items()]}
    if isinstance(value, list):
        return [pack(item, depth - 1) for item in value]
    for tag, kind in _TAGGED.items():
        if isinstance(value, kind):
            return {tag: [pack(item, depth - 1) for item in value]}
    raise NotPlain(f"a {type(value).__name__} is not a plain value")


def unpack(packed: Any, depth: int = _DEPTH) -> Any:
    """The value that was packed, from data that may be malicious. Raises NotPlain."""
    if depth == 0:
        raise NotPlain("a value is nested too deeply")
    if isinstance(packed, list):
        return [unpack(item, depth - 1) for item in packed]
    if not isinstance(packed, dict):
        return packed  # exactly None, bool, int, float or str, as json made it
    try:
        [(tag, content)] = packed.items()
        if tag == "complex":
            real, imaginary = content
            return complex(float(real), float(imaginary))
        if tag == "bytes":
            return content.encode("latin-1")
        if tag == "dict":
            return {unpack(key, depth - 1): unpack(item, depth - 1) for key, item in content}
        return _TAGGED[tag](unpack(item, depth - 1) for item in content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise NotPlain("a message is malformed") from None


def encode(message: Any, limit: int = FRAME_BYTES) -> bytes:
    """Raises NotPlain for a message above `limit` bytes, or with a number that has too many digits for Python."""
    try:
        data = json.dumps(message).encode()
    except (ValueError, RecursionError) as error:
        raise NotPlain(str(error)) from None
    if len(data) > limit:
        raise NotPlain(f"a message has {len(data):,} bytes, more than {limit:,}")
    return struct.pack(">I", len(data)) + data


def send(fd: int, message: Any) -> None:
    """Raises Lost if the reader is gone."""
    write(fd, encode(message))


def write(fd: int, frame: bytes) -> None:
    rest = memoryview(frame)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except (BrokenPipeError, ConnectionResetError):
            raise Lost from None


def receive(fd: int, limit: int = FRAME_BYTES) -> Any:
    """The next message. Raises Lost at the end of the stream, NotPlain for anything that `send` would not write."""
    (size,) = struct.unpack(">I", _exactly(fd, 4))
    if size > limit:
        raise NotPlain(f"a message has {size:,} bytes, more than {limit:,}")
    try:
        return json.loads(_exactly(fd, size))
    except (ValueError, RecursionError):  # also of an int with more digits than Python converts
        raise NotPlain("a message is malformed") from None


def _exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            piece = os.read(fd, size - len(data))
        except ConnectionResetError:
            raise Lost from None
        if not piece:
            raise Lost
        data += piece
    return bytes(data)
