"""Files that are complete or absent, even after a power cut; small JSON files, read without trust in their content."""

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from data.trust import fits, shown

Content = TypeVar("Content", dict[str, Any], list[Any])


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path`, once its content is on the disk."""
    sync(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Replace `path` by `text`, in UTF-8. A reader sees the old content or the new, never a part of it.

    sync: wait for the disk, so that this holds after a power cut, too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        put_in_place(temporary, path) if sync else os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None, sync: bool = True) -> None:
    """Replace `path` by `content` as JSON, as `write_text` does. default: as in json.dumps."""
    write_text(path, json.dumps(content, indent=1, default=default), sync)


def keep_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None, sync: bool = True) -> None:
    """`write_json` for a file of our own: its directory is created, and a directory in its place is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        remove(path)
    write_json(path, content, default, sync)


def read_json(path: Path, kind: type[Content]) -> Content | None:
    """The object (kind=dict) or the array (kind=list) in `path`.

    None where there is no such file, and also where it is damaged: empty, cut off, of another type, a directory, not
    readable. Damage is reported once per process and path; the caller continues as if the file were absent.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        _report(path, getattr(error, "strerror", None) or str(error) or type(error).__name__)
        return None
    if not isinstance(content, kind):
        _report(path, f"contains {type(content).__name__}, expected {kind.__name__}")
        return None
    return content


def read_record(path: Path, usual: dict[str, Any]) -> dict[str, Any] | None:
    """The object in `path`, with the values of `usual` for what is missing or null.

    None as in `read_json`, and if a value does not have the type that it has in `usual`.
    """
    found = read_json(path, dict)
    if found is None:
        return None
    record = usual | {name: value for name, value in found.items() if value is not None or name not in usual}
    for name, value in usual.items():
        if not fits(record[name], value):
            _report(path, f"{name} is {shown(record[name])}")
            return None
    return record


def read_fields(path: Path, usual: dict[str, Any]) -> dict[str, Any]:
    """As `read_record`, with the names of `usual` alone; `usual` itself if nothing can be read."""
    record = read_record(path, usual) or usual
    return {name: record[name] for name in usual}


@functools.cache
def _report(path: Path, why: str) -> None:
    logging.getLogger(__name__).warning("%s is damaged and is ignored (%s)", path, why)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy where the file system does not support links.

    It appears complete or not at all, and replaces what was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file leaves both


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for its holder: another thread or process, whose death frees it."""
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Its last holder may have removed the file while we waited: then it guards nothing.
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def reserve(path: Path) -> None:
    """Allocate the disk space of a file that will be memory-mapped: a full disk is an OSError here, a SIGBUS later."""
    if hasattr(os, "posix_fallocate"):  # not on every system
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def remove(path: Path) -> None:
    """Delete a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
