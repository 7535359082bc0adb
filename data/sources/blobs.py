"""Files kept once each under the sha256 of their content, and linked from wherever they are needed."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.durable import put_in_place
from data.trust import check_sha256


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Blobs:
    """`root`/SHA256 are whole, verified files; `root`/tmp holds those on their way.

    Several processes may put the same file at the same time: `lock` lets one of them do it.
    """

    def __init__(self, root: Path):
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / check_sha256(sha256, str(self.root))

    def partial(self, sha256: str) -> Path:
        """Where the file grows. It outlives a crash, so that fetching goes on where it was."""
        return self.root / "tmp" / check_sha256(sha256, str(self.root))

    def has(self, sha256: str) -> bool:
        """Whether the whole file is here, read and checked; a damaged one is removed."""
        path = self.path(sha256)
        if not path.is_file():
            return False
        if file_sha256(path) == sha256:
            return True
        path.unlink(missing_ok=True)
        return False

    def publish(self, sha256: str) -> bool:
        """Turn the partial file into a blob if its content is right; otherwise drop it and return False."""
        partial = self.partial(sha256)
        if file_sha256(partial) != sha256:
            partial.unlink()
            return False
        put_in_place(partial, self.path(sha256))
        return True

    def add(self, source: Path) -> str:
        """Take a copy of `source`; returns its sha256."""
        sha256 = file_sha256(source)
        with self.lock(sha256):
            if not self.has(sha256):
                shutil.copyfile(source, self.partial(sha256))
                if not self.publish(sha256):
                    return self.add(source)  # it changed while it was copied
        return sha256

    @contextmanager
    def lock(self, sha256: str) -> Iterator[None]:
        with locked(self.partial(sha256).with_suffix(".lock")):
            yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it: another thread or process, whose death frees it."""
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


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy where the file system has none.

    Appears whole or not at all, and replaces what was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # rename of two names of one file leaves both
