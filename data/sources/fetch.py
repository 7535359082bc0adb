"""Fetching files whole, however bad the line is: retried, resumed and checked against their sha256."""

import hashlib
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError, DiskFull
from data.sources.blobs import Blobs
from data.sources.ratelimit import Turnstile
from data.sources.web import (
    Line,
    Pace,
    Stalled,
    check,
    head,
    headers,
    http_errors,
    patiently,
    pause,
    raise_if_final,
    status_of,
    stream,
    unreachable,
)
from data.trust import check_sha256, check_size, is_sha256

ATTEMPTS = 8  # in a row without progress; a few bytes in minutes are none
DAMAGED_ATTEMPTS = 5  # whole files that came with other bytes than announced
LARGEST_HASHED = 4 << 30  # bytes of a file whose sha256 no server names, so that it must be read to its end


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


class Sink(Protocol):
    """Where the bytes of a transfer go; `size` bytes have arrived."""

    size: int

    def write(self, chunk: bytes) -> None: ...

    def restart(self) -> None: ...


def describe_url(url: str, own_token: bool = False) -> dict[str, Any]:
    """{"sha256", "bytes"} of what a URL holds: from its ETag where that is a sha256, else by reading it all.

    Raises DataError when it is not available, or would have to be read and exceeds LARGEST_HASHED.
    """
    try:
        response = patiently(lambda: head(url, own_token), url)
    except http_errors() as error:
        raise_if_final(error, url)
        raise unreachable(url, error) from None
    if response.headers.get("Content-Type", "").startswith("text/html") and not url.endswith((".html", ".htm")):
        raise DataError(f"{url}: the answer is a web page, not the file. Open it in a browser, or try another mirror.")
    etag = response.headers.get("ETag", "").removeprefix("W/").strip('"')
    size = response.headers.get("Content-Length")
    if is_sha256(etag) and size:
        return {"sha256": etag, "bytes": int(size)}
    sink = _HashSink()
    _transfer(url, sink, own_token, None, Line())
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

    What is there already is checked, not fetched; what was begun goes on where it was. Raises DataError, DiskFull.
    """
    unique = {item.sha256: item for item in wanted}
    _check_room(list(unique.values()), blobs)
    waiting: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
    for item in unique.values():
        waiting.put(item)
    finished: queue.SimpleQueue[Wanted | BaseException] = queue.SimpleQueue()
    line = Line(Turnstile(say))
    for _ in range(min(max(1, workers), len(unique))):
        # Daemons, so that a stalled connection cannot keep the process from ending.
        threading.Thread(target=_work, args=(waiting, finished, blobs, line), daemon=True).start()
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
        line.stop.set()
    return True


def _work(waiting: queue.SimpleQueue, finished: queue.SimpleQueue, blobs: Blobs, line: Line) -> None:
    while not line.stop.is_set():
        try:
            item = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            with blobs.lock(item.sha256):
                if not blobs.has(item.sha256):
                    _fetch(item, blobs, line)
            finished.put(item)
        except BaseException as error:  # handed to the thread that waits, which raises it
            finished.put(error)


def _fetch(item: Wanted, blobs: Blobs, line: Line) -> None:
    for _ in range(DAMAGED_ATTEMPTS):
        try:
            with _FileSink(blobs.partial(item.sha256)) as sink:
                _transfer(item.url, sink, item.own_token, item.bytes, line)
        except TooLong:
            continue
        if line.stop.is_set() or blobs.publish(item.sha256):
            return
    raise DataError(
        f"{item.name} from {item.url} came {DAMAGED_ATTEMPTS} times with other bytes than its sha256 "
        f"{item.sha256[:12]} names. Try another endpoint, or name the revision you want."
    )


def _transfer(url: str, sink: Sink, own_token: bool, size: int | None, line: Line) -> None:
    """Bring all of `url` into `sink`, going on after each failure; returns early, incomplete, once it is to stop.

    Empties the sink and raises TooLong once more than `size` bytes arrive, or LARGEST_HASHED if that is None.
    """
    failures = refusals = 0
    most = LARGEST_HASHED if size is None else size
    while not line.stop.is_set() and sink.size != size:
        before = sink.size
        line.turnstile.pass_through(line.stop)
        try:
            announced = _attempt(url, sink, own_token, most, line.stop)
            size = announced if size is None else size
            if size is None or sink.size == size:
                return
            reason: Exception = DataError(f"the connection ended after {sink.size} of {size} bytes")
        except http_errors() as error:
            raise_if_final(error, url)
            reason = error
        if sink.size > before and not isinstance(reason, Stalled):
            failures = refusals = 0
        elif line.refused(reason, refusals, url):
            refusals += 1
            continue
        else:
            failures += 1
        if failures >= ATTEMPTS or status_of(reason) == 429:
            raise unreachable(url, reason)
        line.stop.wait(pause(failures))


def _attempt(url: str, sink: Sink, own_token: bool, most: int, stop: threading.Event) -> int | None:
    """One connection, from where the sink is; returns the whole size if the server says it."""
    request = headers(own_token)
    if sink.size:
        request["Range"] = f"bytes={sink.size}-"
    with stream(url, request) as response:
        if response.status_code == 416 or (sink.size and response.status_code == 200):
            sink.restart()  # the server knows no such range, or begins again
        check(response)
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


class _FileSink:
    """Appends to a file that an earlier process may have begun."""

    def __init__(self, path: Path):
        self.file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        self.size = self.file.tell()

    def __enter__(self) -> "_FileSink":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self.file.truncate(0)
        self.size = 0


class _HashSink:
    """Keeps nothing but the digest."""

    def __init__(self) -> None:
        self.restart()

    def write(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self.digest, self.size = hashlib.sha256(), 0


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
            "Make room, ask for fewer shards, or put store.root on a larger disk."
        )
