"""Fetching files whole, however bad the line is: retried, resumed and checked against their sha256."""

import errno
import functools
import hashlib
import importlib
import logging
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.blobs import Blobs
from data.errors import DataError, DiskFull
from data.ratelimit import WAITS, Turnstile, asked_seconds

Answer = TypeVar("Answer")

RESULT_NEUTRAL = "fetches files that are checked against the sha256 in the key"

TIMEOUT_SECONDS = 20.0  # of silence on a connection before it counts as dead
ATTEMPTS = 8  # in a row without a byte of progress
QUESTIONS = 4  # to a hub before it counts as unreachable
DAMAGED_ATTEMPTS = 5  # whole files that came with other bytes than announced
LONGEST_PAUSE_SECONDS = 20.0


@dataclass(frozen=True)
class Wanted:
    """One file to fetch: its name for messages, where it is, and what it must be."""

    name: str
    url: str
    sha256: str
    bytes: int
    own_token: bool = False  # send the user's hub token; only ever to the hub itself


class Sink(Protocol):
    """Where the bytes of a transfer go; `size` bytes have arrived."""

    size: int

    def write(self, chunk: bytes) -> None: ...

    def restart(self) -> None: ...


def describe_url(url: str, own_token: bool = False) -> dict[str, Any]:
    """{"sha256", "bytes"} of what a URL holds: from its ETag where that is a sha256, else by reading it all.

    Raises DataError when it cannot be had.
    """

    def ask() -> Any:
        response = _session().head(url, headers=_headers(own_token), timeout=TIMEOUT_SECONDS, follow_redirects=True)
        _check(response)
        return response

    try:
        response = patiently(ask, url)
    except http_errors() as error:
        _raise_if_final(error, url)
        raise unreachable(url, error) from None
    etag = response.headers.get("ETag", "").removeprefix("W/").strip('"')
    size = response.headers.get("Content-Length")
    if len(etag) == 64 and all(c in "0123456789abcdef" for c in etag) and size:
        return {"sha256": etag, "bytes": int(size)}
    sink = _HashSink()
    _transfer(url, sink, own_token, None, Line())
    return {"sha256": sink.digest.hexdigest(), "bytes": sink.size}


def patiently(ask: Callable[[], Answer], url: str) -> Answer:
    """ask(), again after a while when the line or the server fails; what the last failure raised when none succeeds."""
    line = Line()
    failures = refusals = 0
    while True:
        line.turnstile.pass_through(line.stop)
        try:
            return ask()
        except http_errors() as error:
            if _refused(error, refusals, line, url):
                refusals += 1
                continue
            failures += 1
            status = status_of(error)
            if failures == QUESTIONS or (status is not None and status < 500 and status != 408):
                raise
        time.sleep(_pause(failures))


@dataclass
class Line:
    """What the connections of a download share."""

    turnstile: Turnstile = field(default_factory=lambda: Turnstile(logging.getLogger(__name__).warning))
    stop: threading.Event = field(default_factory=threading.Event)


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
        with _FileSink(blobs.partial(item.sha256)) as sink:
            _transfer(item.url, sink, item.own_token, item.bytes, line)
        if line.stop.is_set() or blobs.publish(item.sha256):
            return
    raise DataError(
        f"{item.name} from {item.url} came {DAMAGED_ATTEMPTS} times with other bytes than its sha256 "
        f"{item.sha256[:12]} names. Try another endpoint, or name the revision you want."
    )


def _transfer(url: str, sink: Sink, own_token: bool, size: int | None, line: Line) -> None:
    """Bring all of `url` into `sink`, going on after each failure; returns early, incomplete, once it is to stop."""
    failures = refusals = 0
    while not line.stop.is_set() and sink.size != size:
        before = sink.size
        line.turnstile.pass_through(line.stop)
        try:
            announced = _attempt(url, sink, own_token, line.stop)
            size = announced if size is None else size
            if size is None or sink.size == size:
                return
            reason: Exception = DataError(f"the connection ended after {sink.size} of {size} bytes")
            if sink.size > size:
                sink.restart()
        except http_errors() as error:
            _raise_if_final(error, url)
            reason = error
        if sink.size > before:
            failures = refusals = 0
        elif _refused(reason, refusals, line, url):
            refusals += 1
            continue
        else:
            failures += 1
        if failures >= ATTEMPTS or status_of(reason) == 429:
            raise unreachable(url, reason)
        line.stop.wait(_pause(failures))


def _refused(error: Exception, refusals: int, line: Line, url: str) -> bool:
    """Whether the server only wants to be left alone for a while; then nothing passes for as long.

    refusals: how often in a row it has said so before; after so many it is a failure like others.
    """
    asked = asked_seconds(error)
    if asked is None or refusals == WAITS:
        return False
    line.turnstile.close(asked, refusals + 1, url)
    return True


def _attempt(url: str, sink: Sink, own_token: bool, stop: threading.Event) -> int | None:
    """One connection, from where the sink is; returns the whole size if the server says it."""
    headers = _headers(own_token)
    if sink.size:
        headers["Range"] = f"bytes={sink.size}-"
    with _session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True) as response:
        if response.status_code == 416 or (sink.size and response.status_code == 200):
            sink.restart()  # the server knows no such range, or begins again
        _check(response)
        length = response.headers.get("Content-Length")
        size = sink.size + int(length) if length else None
        for chunk in response.iter_bytes():
            sink.write(chunk)
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


def _session() -> Any:
    from huggingface_hub import get_session

    return get_session()


def _headers(own_token: bool) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    # A range of compressed bytes would be a range of something else.
    return build_hf_headers(token=None if own_token else False) | {"Accept-Encoding": "identity"}


@functools.cache
def http_errors() -> tuple[type[Exception], ...]:
    """What a bad line raises. huggingface_hub has changed its HTTP library and may again: ask its client for it."""
    library = importlib.import_module(type(_session()).__module__.partition(".")[0])
    return (library.HTTPError, OSError)


def _check(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)


def _raise_if_final(error: Exception, url: str) -> None:
    """Raise for the user what no second attempt mends."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(f"no room left on the disk while fetching {url}. Make room and run the same again.") from None
    status = status_of(error)
    if status in (401, 403):
        raise DataError(
            f"{url}: access denied ({status}). Accept its terms on the hub, then `hf auth login`."
        ) from None
    if status in (404, 410):
        raise DataError(f"{url}: there is no such file ({status}).") from None


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row; uneven, so that many who failed together do not return so."""
    return min(LONGEST_PAUSE_SECONDS, 0.25 * 2**failures) * (0.5 + random.random())


def unreachable(what: str, error: Exception) -> DataError:
    status = status_of(error)
    if status == 429:
        return DataError(
            f"{what}: too many requests (429), and so it stays after all waiting. Run the same again later, log in "
            "(`hf auth login`) for a higher limit, or set HF_ENDPOINT to a mirror."
        )
    said = f"it answers {status}" if status else (str(error).splitlines() or [""])[0].rstrip(".")
    reason = said or type(error).__name__
    return DataError(
        f"cannot reach {what}: {reason}. Check the network, or set HF_ENDPOINT to a mirror and run the same again."
    )
