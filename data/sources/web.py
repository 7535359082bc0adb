"""Requests to servers that may be slow, busy or hostile: retries on a bad connection, bounds on each answer."""

import errno
import functools
import importlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urljoin

from data.errors import DataError, DiskFull
from data.sources.ratelimit import WAITS, Turnstile, asked_seconds
from data.trust import origin

Answer = TypeVar("Answer")


TIMEOUT_SECONDS = 20.0  # of silence on a connection before it counts as dead
QUESTIONS = 4  # to a hub before it counts as unreachable
LONGEST_PAUSE_SECONDS = 20.0
SLOW_SECONDS = 180.0  # in which SLOW_BYTES must arrive, or a connection counts as dead, however busy it looks
SLOW_BYTES = 64 << 10
LARGEST_ANSWER = 16 << 20  # bytes of one JSON answer; a page of the hub's file list has about 0.3 MB
LONGEST_ANSWER_SECONDS = 120.0


@dataclass
class Line:
    """State that the connections of a download share."""

    turnstile: Turnstile = field(default_factory=lambda: Turnstile(logging.getLogger(__name__).warning))
    stop: threading.Event = field(default_factory=threading.Event)

    def refused(self, error: Exception, refusals: int, url: str) -> bool:
        """Return True if the server only asks for a pause; nothing passes the turnstile until it is over.

        refusals: how often in a row it has asked before; after WAITS times it is a failure like others.
        """
        asked = asked_seconds(error)
        if asked is None or refusals == WAITS:
            return False
        self.turnstile.close(asked, refusals + 1, url)
        return True


class Stalled(OSError):
    """A connection that is open and sends next to nothing."""


class Pace:
    """The speed of one connection."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def note(self, size: int) -> None:
        """Count in what has arrived. Raises Stalled if that was less than SLOW_BYTES in SLOW_SECONDS."""
        self.bytes += size
        if (now := time.monotonic()) - self.since < SLOW_SECONDS:
            return
        if self.bytes < SLOW_BYTES:
            raise Stalled(f"it sent only {self.bytes:,} bytes in {now - self.since:.0f} s")
        self.since, self.bytes = now, 0


def patiently(ask: Callable[[], Answer], url: str) -> Answer:
    """ask(), again after a while when the line or the server fails; what the last failure raised when none succeeds."""
    line = Line()
    failures = refusals = 0
    while True:
        line.turnstile.pass_through(line.stop)
        try:
            return ask()
        except http_errors() as error:
            if line.refused(error, refusals, url):
                refusals += 1
                continue
            failures += 1
            status = status_of(error)
            if failures == QUESTIONS or (status is not None and status < 500 and status != 408):
                raise
        time.sleep(pause(failures))


def ask_json(url: str, own_token: bool) -> tuple[Any, str]:
    """The JSON that `url` answers with, and the URL of the next page that its Link header names; "" on the last one.

    Raises DataError for an answer that is larger than LARGEST_ANSWER, slower than LONGEST_ANSWER_SECONDS or not JSON,
    and for a next page on another host. Otherwise what http_errors lists.
    """
    started, body = time.monotonic(), bytearray()
    with stream(url, headers(own_token)) as response:
        check(response)
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > LARGEST_ANSWER:
                raise DataError(f"{url}: the answer exceeds {LARGEST_ANSWER >> 20} MB. {ANOTHER_ENDPOINT}")
            if time.monotonic() - started > LONGEST_ANSWER_SECONDS:
                raise DataError(f"{url}: no whole answer in {LONGEST_ANSWER_SECONDS:.0f} s. {ANOTHER_ENDPOINT}")
        following = response.links.get("next", {}).get("url")
        answered_by = str(response.url)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise DataError(f"{url}: the answer is not JSON. {ANOTHER_ENDPOINT}") from None
    if following is None:
        return answer, ""
    following = urljoin(answered_by, following)
    if origin(following) != origin(answered_by):
        raise DataError(f"{url}: the next page of the answer is on another host ({following}). Refused.")
    return answer, following


ANOTHER_ENDPOINT = "Set HF_ENDPOINT to another mirror, or unset it."


def stream(url: str, request_headers: dict[str, str]) -> Any:
    """The response as a context manager, its body unread. A redirect to another host does not carry the token."""
    return _session().stream("GET", url, headers=request_headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)


def head(url: str, own_token: bool) -> Any:
    response = _session().head(url, headers=headers(own_token), timeout=TIMEOUT_SECONDS, follow_redirects=True)
    check(response)
    return response


def _session() -> Any:
    from huggingface_hub import get_session

    return get_session()


def headers(own_token: bool) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    # A range of compressed bytes would be a range of something else.
    return build_hf_headers(token=None if own_token else False) | {"Accept-Encoding": "identity"}


@functools.cache
def http_errors() -> tuple[type[Exception], ...]:
    """Exceptions of a bad connection. huggingface_hub has changed its HTTP library and may again: ask its client."""
    library = importlib.import_module(type(_session()).__module__.partition(".")[0])
    return (library.HTTPError, library.InvalidURL, OSError)


def check(response: Any) -> None:
    """Raise the client's own error for any status but success, without reading the body: that may be endless."""
    response.raise_for_status()


def raise_if_final(error: Exception, url: str) -> None:
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


def pause(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row: exponential backoff with jitter, so that clients that failed
    together do not retry together."""
    return min(LONGEST_PAUSE_SECONDS, 0.25 * 2**failures) * (0.5 + random.random())


def unreachable(what: str, error: Exception) -> DataError:
    status = status_of(error)
    if status == 429:
        return DataError(
            f"{what}: too many requests (429), even after waiting. Run the same again later, log in "
            "(`hf auth login`) for a higher limit, or set HF_ENDPOINT to a mirror."
        )
    said = f"it answers {status}" if status else (str(error).splitlines() or [""])[0].rstrip(".")
    reason = said or type(error).__name__
    return DataError(
        f"cannot reach {what}: {reason}. Check the network, or set HF_ENDPOINT to a mirror and run the same again."
    )
