"""One maker at a time: locks that end with their holder, on one host and across several.

On one host flock(2) is enough: the kernel releases it however a process dies. Some file systems keep flock to each
host. So a holder also increments a heartbeat. An observer takes over, with a higher fencing number, when the heartbeat
has not changed for DEAD_SECONDS on the observer's own clock. The old holder sees the number before it publishes.
"""

import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.durable import keep_json, read_record
from pipeline.artifacts.disk import WRITABLE, is_read_only
from pipeline.errors import Interrupted, StageFailed, UserError

BEAT_SECONDS = 10.0
DEAD_SECONDS = 120.0

STATE = {"host": "", "beat": -1, "fence": 0, "pid": 0, "since": 0.0, "stage": "", "run": ""}


def this_host() -> str:
    """A name for this machine since its last boot. It differs for containers of one name on two machines."""
    with suppress(OSError):
        return f"{platform.node()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:8]}"
    return platform.node()


class Lock:
    """An exclusive lock at `path`, held by `who` (shown to those who wait).

    on_wait(holder) is called about twice a second while another holds it. If `stop()` returns True, the wait ends with
    Interrupted.
    """

    def __init__(
        self,
        path: Path,
        who: dict[str, Any],
        on_wait: Callable[[dict[str, Any]], None] = lambda holder: None,
        stop: Callable[[], bool] = lambda: False,
        host: str | None = None,
        dead_seconds: float = DEAD_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ):
        self.path, self.on_wait, self.stop = path, on_wait, stop
        self.host = host or this_host()
        self.who = who | {"host": self.host, "pid": os.getpid()}
        self.dead_seconds, self.beat_seconds = dead_seconds, beat_seconds
        self.fence = 0
        self._fd = -1
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take_flock()
            self._outlive_other_host()
            self._write(beat=0)
        except BaseException:
            os.close(self._fd)
            raise
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._beating:
            self._beating.join()
        with suppress(OSError):  # a full disk: other hosts notice the missing beat
            if self.holds():
                self._write(beat=-1)
        os.close(self._fd)

    def holds(self) -> bool:
        """Return True if nobody has taken over. Must be checked before anything is published."""
        return self.read().get("fence", self.fence) == self.fence

    def check(self) -> None:
        if not self.holds():
            other = self.read()
            what = f"{other.get('host')} took over its work; this copy ends"
            raise StageFailed(str(self.who.get("stage")), "preempted", what)

    def read(self) -> dict[str, Any]:
        """The record of the last holder. Empty if there was none, or if it cannot be read."""
        return read_record(self._state, STATE) or {}

    @property
    def _state(self) -> Path:
        return self.path.with_suffix(".json")

    def _take_flock(self) -> None:
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._wait(self.read())

    def _outlive_other_host(self) -> None:
        """Wait while a holder on another host shows signs of life, then claim the next fencing number."""
        holder = self.read()
        seen, since = holder.get("beat"), time.monotonic()
        while holder and holder["host"] != self.host and holder["beat"] >= 0:
            if time.monotonic() - since >= self.dead_seconds:
                break
            self._wait(holder)
            holder = self.read()
            if holder.get("beat") != seen:
                seen, since = holder.get("beat"), time.monotonic()
        self.fence = int(holder.get("fence", 0)) + 1
        claim = self.path.with_suffix(f".claim-{self.fence}")
        if holder and holder["host"] != self.host and holder["beat"] >= 0:
            # Two observers may reach this point together; creating the claim decides between them.
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                self._wait(holder)
                self._outlive_other_host()

    def _wait(self, holder: dict[str, Any]) -> None:
        self.on_wait(holder)
        if self.stop():
            raise Interrupted("stopped while waiting for a lock")
        time.sleep(min(0.5, self.dead_seconds / 4))

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self.beat_seconds):
            if not self.holds():
                return
            beat += 1
            with suppress(OSError):  # a full disk is noticed by whoever has something to write
                self._write(beat)

    def _write(self, beat: int) -> None:
        keep_json(self._state, self.who | {"fence": self.fence, "beat": beat})


def is_held(path: Path) -> bool:
    """True if a process of this machine holds the lock at `path`."""
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def share_alive(work: Path) -> int:
    """Lock that each worker holds for its life, so that the next maker of the artifact waits for it. Returns the fd."""
    fd = os.open(work / "alive", os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def wait_for_orphans(work: Path, on_wait: Callable[[], None], stop: Callable[[], bool]) -> None:
    """Return when all workers of earlier makers of `work` have ended."""
    fd = os.open(work / "alive", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                on_wait()
                if stop():
                    raise Interrupted("stopped while waiting for earlier workers to end") from None
                time.sleep(0.2)
    finally:
        os.close(fd)


def probe(folder: Path) -> None:
    """Raise UserError unless `folder` can be written and flock works in it, which some network file systems refuse."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / ".probe", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if not is_read_only(error):
            raise
        what = f"cannot be written ({error.strerror}), but making stages requires it"
        raise UserError(what, f"store.root={folder.parent}", WRITABLE) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError as error:
        what = f"its file system cannot lock files ({error.strerror})"
        raise UserError(what, f"store.root={folder.parent}", "Use a local disk, or a mount with flock.") from None
    finally:
        os.close(fd)
