"""One-line messages about disks that are full or cannot be written: what happened, where, and what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StageFailed

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# Libraries report a full disk in their own exceptions; the last form is NumPy's.
FULL_TEXT = re.compile(r"no space left|disk quota exceeded|\d+ requested and \d+ written", re.IGNORECASE)

ROOM = (
    "Make room: run `gc` to delete what nothing needs, set launch.keep_last=1 to keep fewer checkpoints, or move the "
    "store to a larger disk (store.root). Then run the same command again."
)

WRITABLE = "Make the store writable, or set store.root to a directory that is."


def is_full(error: BaseException) -> bool:
    """Return True if `error` reports that no space is left."""
    return (isinstance(error, OSError) and error.errno in FULL) or FULL_TEXT.search(str(error)) is not None


def is_read_only(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in READ_ONLY


def told(error: OSError) -> str:
    """The message for a file that a command could not read or write."""
    where = _path(error)
    if is_full(error):
        return f"No space left on device{where and f': {where}'}. {ROOM}"
    if error.errno == errno.EROFS:
        return f"{where or 'The store'} cannot be written ({error.strerror}). {WRITABLE}"
    return f"{error.strerror or error}{where and f': {where}'}"


def full(error: BaseException, work: Path) -> str:
    """The message for a full disk. work: where the stage was writing, for errors that do not name a file."""
    return f"No space left on device: {_path(error) or work}. {ROOM}"


def read_only(error: OSError, root: Path) -> str:
    return f"{_path(error) or root} cannot be written ({error.strerror}). {WRITABLE}"


@contextmanager
def failures_of(stage: str, work: Path, root: Path) -> Iterator[None]:
    """Turn errors of a full or read-only store into StageFailed. work: where the stage is made. root: the store."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StageFailed(stage, "disk", full(error, work), str(work / "log.txt")) from None
        if is_read_only(error) and str(root) in _path(error):
            raise StageFailed(stage, "disk", read_only(error, root)) from None
        raise


def _path(error: BaseException) -> str:
    return str(getattr(error, "filename", None) or "")
