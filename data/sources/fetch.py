"""Files fetched completely over any connection: retried, resumed, checked against their SHA-256 and kept under it."""

import hashlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.durable import file_sha256, locked, put_in_place
from data.errors import DataError, DiskFull
from data.sources.web import (
    Pace,
    RateLimiter,
    Stalled,
    head,
    headers,
    http_errors,
    pause,
    raise_if_final,
    retried,
    status_of,
    stream,
    unreachable,
)
from data.trust import check_sha256, check_size, is_sha256

ATTEMPTS = 8  # in a row without progress; a few bytes in minutes do not count
DAMAGED_ATTEMPTS = 5  # complete files that differ from what was announced
LARGEST_HASHED = 4 << 30  # bytes of a file whose sha256 no server announces, so that all of it must be read


class Blobs:
    """Files kept once each under the SHA-256 of their content: `root`/SHA256 are complete and verified, `root`/tmp are
    being fetched. Several processes may add the same file at the same time: `lock` lets one of them do it."""

    def __init__(self, root: Path):
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / check_sha256(sha256, str(self.root))

    def partial(self, sha256: str) -> Path:
        """The file as far as it has arrived. It outlives a crash, so that fetching resumes there."""
        return self.root / "tmp" / check_sha256(sha256, str(self.root))

    def has(self, sha256: str) -> bool:
        """Return True if the file is complete, after reading all of it; a damaged one is removed."""
        path = self.path(sha256)
        if not path.is_file():
            return False
        if file_sha256(path) == sha256:
            return True
        path.unlink(missing_ok=True)
        return False

    def publish(self, sha256: str) -> bool:
        """Turn the partial file into a blob if its content is right; otherwise delete it and return False."""
        partial = self.partial(sha256)
        if file_sha256(partial) != sha256:
            partial.unlink()
            return False
        put_in_place(partial, self.path(sha256))
        return True

    def add(self, source: Path) -> str:
        """Copy `source` into the blobs; returns its sha256."""
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


@dataclass(frozen=True)
class Wanted:
    """One file to fetch: its name for messages, where it is, and what it must be."""

    name: str
    url: str
    sha256: str
    bytes: int
    own_token: bool = False  # send the user's hub token; only ever to the hub itself

    def __post_init__(self) -> None:
        check_sha256(self.sha256, self.name)
        check_size(self.bytes, self.name)


class TooLong(DataError):
    """A server sends more than it announced."""


def describe_url(url: str, own_token: bool = False) -> dict[str, Any]:
    """{"sha256", "bytes"} of the file at a URL: from its ETag where that is a sha256, else by reading all of it.

    Raises DataError when it is not available, or would have to be read and exceeds LARGEST_HASHED.
    """
    try:
        response = retried(lambda: head(url, own_token), url)
    except http_errors() as error:
        raise_if_final(error, url)
        raise unreachable(url, error) from None
    if response.headers.get("Content-Type", "").startswith("text/html") and not url.endswith((".html", ".htm")):
        raise DataError(f"{url}: the answer is a web page, not the file. Open it in a browser, or try another mirror.")
    etag = response.headers.get("ETag", "").removeprefix("W/").strip('"')
    size = response.headers.get("Content-Length")
    if is_sha256(etag) and size:
        return {"sha256": etag, "bytes": int(size)}
    sink = _Sink()
    _transfer(url, sink, own_token, None, RateLimiter())
    return {"sha256": sink.digest.hexdigest(), "bytes": sink.size}


def fetch_all(
    wanted: list[Wanted],
    blobs: Blobs,
    workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Bring every wanted file into `blobs`, `workers` at a time; False if stopped before all were there.

    Files that are there are checked, not fetched; partial ones are resumed. Raises DataError, DiskFull.
    """
    unique = {item.sha256: item for item in wanted}
    _check_room(list(unique.values()), blobs)
    waiting: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
    for item in unique.values():
        waiting.put(item)
    finished: queue.SimpleQueue[Wanted | BaseException] = queue.SimpleQueue()
    limiter = RateLimiter(say)
    for _ in range(min(max(1, workers), len(unique))):
        # Daemons, so that a stalled connection cannot keep the process from ending.
        threading.Thread(target=_work, args=(waiting, finished, blobs, limiter), daemon=True).start()
    total = sum(item.bytes for item in unique.values())
    running = dict(unique)
    try:
        while running:
            if should_stop():
                return False
            try:
                outcome = finished.get(timeout=0.2)
            except queue.Empty:
                outcome = None
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                del running[outcome.sha256]
            on_progress(total - sum(item.bytes - _arrived(item, blobs) for item in running.values()), total)
    finally:
        limiter.stop.set()
    return True


def _work(waiting: queue.SimpleQueue, finished: queue.SimpleQueue, blobs: Blobs, limiter: RateLimiter) -> None:
    while not limiter.stop.is_set():
        try:
            item = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            with blobs.lock(item.sha256):
                if not blobs.has(item.sha256):
                    _fetch(item, blobs, limiter)
            finished.put(item)
        except BaseException as error:  # passed to the waiting thread, which raises it
            finished.put(error)


def _fetch(item: Wanted, blobs: Blobs, limiter: RateLimiter) -> None:
    for _ in range(DAMAGED_ATTEMPTS):
        try:
            with open(blobs.partial(item.sha256), "ab") as file:  # resumes what an earlier process has begun
                _transfer(item.url, _Sink(file), item.own_token, item.bytes, limiter)
        except TooLong:
            continue
        if limiter.stop.is_set() or blobs.publish(item.sha256):
            return
    raise DataError(
        f"{item.name} from {item.url} came {DAMAGED_ATTEMPTS} times with other bytes than its sha256 "
        f"{item.sha256[:12]} names. Try another endpoint, or name the revision you want."
    )


class _Sink:
    """Receives the bytes of a transfer: appends them to `file`, or keeps nothing but their digest."""

    def __init__(self, file: BinaryIO | None = None):
        self.file, self.size, self.digest = file, file.tell() if file else 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        if self.file:
            self.file.write(chunk)
        else:
            self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        if self.file:
            self.file.truncate(0)
        self.size, self.digest = 0, hashlib.sha256()


def _transfer(url: str, sink: _Sink, own_token: bool, size: int | None, limiter: RateLimiter) -> None:
    """Bring all of `url` into `sink`, resuming after each failure; returns early, incomplete, when asked to stop.

    Empties the sink and raises TooLong once more than `size` bytes arrive, or LARGEST_HASHED if that is None.
    """
    failures = refusals = 0
    most = LARGEST_HASHED if size is None else size
    while not limiter.stop.is_set() and sink.size != size:
        before = sink.size
        limiter.wait()
        try:
            announced = _attempt(url, sink, own_token, most, limiter.stop)
            size = announced if size is None else size
            if size is None or sink.size == size:
                return
            reason: Exception = DataError(f"the connection ended after {sink.size} of {size} bytes")
        except http_errors() as error:
            raise_if_final(error, url)
            reason = error
        if sink.size > before and not isinstance(reason, Stalled):
            failures = refusals = 0
        elif limiter.refused(reason, refusals, url):
            refusals += 1
            continue
        else:
            failures += 1
        if failures >= ATTEMPTS or status_of(reason) == 429:
            raise unreachable(url, reason)
        limiter.stop.wait(pause(failures))


def _attempt(url: str, sink: _Sink, own_token: bool, most: int, stop: threading.Event) -> int | None:
    """One connection, from the sink's size on; returns the size of the file if the server announces it."""
    request = headers(own_token)
    if sink.size:
        request["Range"] = f"bytes={sink.size}-"
    with stream(url, request) as response:
        if response.status_code == 416 or (sink.size and response.status_code == 200):
            sink.restart()  # the server does not have this range, or starts at the beginning
        response.raise_for_status()
        length = response.headers.get("Content-Length")
        size = sink.size + int(length) if length else None
        if size is not None and size > most:
            sink.restart()
            raise TooLong(f"{url}: announces {size:,} bytes, more than the {most:,} allowed. Refused.")
        pace = Pace()
        for chunk in response.iter_raw():
            if sink.size + len(chunk) > most:
                sink.restart()
                raise TooLong(f"{url}: sends more than {most:,} bytes. Cut off.")
            sink.write(chunk)
            pace.note(len(chunk))
            if stop.is_set():
                break
    return size


def _arrived(item: Wanted, blobs: Blobs) -> int:
    try:
        return min(item.bytes, blobs.partial(item.sha256).stat().st_size)
    except FileNotFoundError:
        return 0


def _check_room(wanted: list[Wanted], blobs: Blobs) -> None:
    needed = sum(w.bytes - _arrived(w, blobs) for w in wanted if not blobs.path(w.sha256).exists())
    free = shutil.disk_usage(blobs.root).free
    if needed > free:
        raise DiskFull(
            f"{blobs.root}: {needed / 1e6:,.0f} MB are still to be fetched, but {free / 1e6:,.0f} MB are free. "
            "Free some space, ask for fewer shards, or put store.root on a larger disk."
        )
