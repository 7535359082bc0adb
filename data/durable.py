"""Files that are whole or absent, even after a power cut, and small JSON files that may hold anything when read."""

import functools
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

RESULT_NEUTRAL = "stores what others made"

Content = TypeVar("Content", dict[str, Any], list[Any])


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, in UTF-8. A reader sees the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        put_in_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Replace `path` by `content` as JSON, whole. default: as in json.dumps, for values that JSON has no type for."""
    write_text(path, json.dumps(content, indent=1, default=default))


def read_json(path: Path, kind: type[Content]) -> Content | None:
    """The object (kind=dict) or the array (kind=list) in `path`.

    None where there is no such file, and also where it is damaged: empty, cut off, of another type, a directory, not
    readable. Damage is reported once per process and path; the caller goes on as if the file were absent.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        _report(path, str(error) or type(error).__name__)
        return None
    if not isinstance(content, kind):
        _report(path, f"holds {type(content).__name__}, expected {kind.__name__}")
        return None
    return content


@functools.cache
def _report(path: Path, why: str) -> None:
    logging.getLogger(__name__).warning("%s is damaged and is ignored (%s)", path, why)
