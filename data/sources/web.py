"""Requests to servers that may be slow, busy or hostile: retries, a rate limiter, and bounds on each answer."""

import email.utils
import errno
import functools
import importlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from data.errors import DataError, DiskFull
from data.trust import origin

Answer = TypeVar("Answer")

TIMEOUT_SECONDS = 20.0  # of silence on a connection before it counts as dead
QUESTIONS = 4  # attempts before a hub counts as unreachable
LONGEST_PAUSE_SECONDS = 20.0  # between two attempts
SLOW_SECONDS = 180.0  # in which SLOW_BYTES must arrive, or a connection counts as dead, however busy it looks
SLOW_BYTES = 64 << 10
LARGEST_ANSWER = 16 << 20  # bytes of one JSON answer; a page of the hub's file list has about 0.3 MB
LONGEST_ANSWER_SECONDS = 120.0
FIRST_WAIT_SECONDS = 10.0  # after a 429 that does not say how long to wait; doubled each further time
LONGEST_WAIT_SECONDS = 300.0  # whatever the server asks for: the hub counts requests in windows of five minutes
WAITS = 8  # in a row without a byte of progress
ANOTHER_ENDPOINT = "Set HF_ENDPOINT to another mirror, or unset it."


# --- waiting


class RateLimiter:
    """Shared by the connections of a download: once a server refuses one of them (429), none asks until it may again.

    say: called once per pause, however many connections were refused; None: logged. stop: set it to end all waiting.
    """

    def __init__(self, say: Callable[[str], Any] | None = None):
        self.stop = threading.Event()
        self._say = say or logging.getLogger(__name__).warning
        self._opens_at = 0.0
        self._lock = threading.Lock()

    def refused(self, error: Exception, refusals: int, url: str) -> bool:
        """Return True if the server only asks for a pause, which then begins for all connections.

        refusals: the number of refusals in a row before this one; after WAITS of them it is a failure like others.
        """
        asked = asked_seconds(error)
        if asked is None or refusals == WAITS:
            return False
        seconds = min(LONGEST_WAIT_SECONDS, asked or FIRST_WAIT_SECONDS * 2**refusals)
        with self._lock:
            closed = time.monotonic() < self._opens_at
            self._opens_at = max(self._opens_at, time.monotonic() + seconds)
        if not closed:
            why = "as it asks" if asked == seconds else f"it asks for {asked:.0f}" if asked else "it does not say more"
            self._say(f"{urlsplit(url).netloc}: too many requests. Retrying in {seconds:.0f} s ({why}).")
        return True

    def wait(self) -> None:
        """Return when requests are allowed, or `stop` is set."""
        while (left := self._opens_at - time.monotonic()) > 0 and not self.stop.wait(left):
            pass


def asked_seconds(error: Exception) -> float | None:
    """Seconds that the server asks to wait; 0.0 for a 429 that does not say; None for other errors.

    Read from Retry-After (RFC 9110: seconds or a date), else from the hub's `RateLimit: "api";r=0;t=55`.
    """
    response = getattr(error, "response", None)
    if response is None or response.status_code not in (429, 503):
        return None
    retry_after = response.headers.get("Retry-After")
    if not retry_after:
        reset = re.search(r"\br=0\b.*\bt=(\d+)", response.headers.get("RateLimit", ""))
        return None if response.status_code == 503 else float(reset[1]) if reset else 0.0
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def pause(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row: exponential backoff with jitter, so that clients that failed
    together do not retry together."""
    return min(LONGEST_PAUSE_SECONDS, 0.25 * 2**failures) * (0.5 + random.random())


class Stalled(OSError):
    """A connection that is open and delivers next to nothing."""


class Pace:
    """The speed of one connection."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def note(self, size: int) -> None:
        """Count bytes that have arrived. Raises Stalled if they were fewer than SLOW_BYTES in SLOW_SECONDS."""
        self.bytes += size
        if (now := time.monotonic()) - self.since < SLOW_SECONDS:
            return
        if self.bytes < SLOW_BYTES:
            raise Stalled(f"it sent only {self.bytes:,} bytes in {now - self.since:.0f} s")
        self.since, self.bytes = now, 0


# --- asking


def retried(ask: Callable[[], Answer], url: str) -> Answer:
    """ask(), repeated after a pause when the connection or the server fails. Raises what the last attempt raised."""
    limiter = RateLimiter()
    failures = refusals = 0
    while True:
        limiter.wait()
        try:
            return ask()
        except http_errors() as error:
            if limiter.refused(error, refusals, url):
                refusals += 1
                continue
            failures += 1
            status = status_of(error)
            if failures == QUESTIONS or (status is not None and status < 500 and status != 408):
                raise
        time.sleep(pause(failures))


def ask_json(url: str, own_token: bool) -> tuple[Any, str]:
    """The JSON answer of `url`, and the URL of the next page according to its Link header; "" on the last page.

    Raises DataError for an answer that is larger than LARGEST_ANSWER, slower than LONGEST_ANSWER_SECONDS or not JSON,
    and for a next page on another host. Otherwise what http_errors lists.
    """
    started, body = time.monotonic(), bytearray()
    with stream(url, headers(own_token)) as response:
        response.raise_for_status()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > LARGEST_ANSWER:
                raise DataError(f"{url}: the answer exceeds {LARGEST_ANSWER >> 20} MB. {ANOTHER_ENDPOINT}")
            if time.monotonic() - started > LONGEST_ANSWER_SECONDS:
                raise DataError(f"{url}: no complete answer in {LONGEST_ANSWER_SECONDS:.0f} s. {ANOTHER_ENDPOINT}")
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


def stream(url: str, request_headers: dict[str, str]) -> Any:
    """The response as a context manager, its body unread. A redirect to another host does not carry the token.

    Its raise_for_status() does not read the body either, which may be endless.
    """
    return _session().stream("GET", url, headers=request_headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)


def head(url: str, own_token: bool) -> Any:
    response = _session().head(url, headers=headers(own_token), timeout=TIMEOUT_SECONDS, follow_redirects=True)
    response.raise_for_status()
    return response


def headers(own_token: bool) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    # Uncompressed: a range of compressed bytes would be a range of something else.
    return build_hf_headers(token=None if own_token else False) | {"Accept-Encoding": "identity"}


def _session() -> Any:
    from huggingface_hub import get_session

    return get_session()


# --- errors


@functools.cache
def http_errors() -> tuple[type[Exception], ...]:
    """Exceptions of a bad connection. huggingface_hub has changed its HTTP library and may again: ask its client."""
    library = importlib.import_module(type(_session()).__module__.partition(".")[0])
    return (library.HTTPError, library.InvalidURL, OSError)


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def raise_if_final(error: Exception, url: str) -> None:
    """Raise an error for the user if another attempt cannot succeed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(f"the disk is full: cannot store {url}. Free some space and run the same again.") from None
    status = status_of(error)
    if status in (401, 403):
        raise DataError(
            f"{url}: access denied ({status}). Accept its terms on the hub, then `hf auth login`."
        ) from None
    if status in (404, 410):
        raise DataError(f"{url}: there is no such file ({status}).") from None


def unreachable(what: str, error: Exception) -> DataError:
    status = status_of(error)
    if status == 429:
        return DataError(
            f"{what}: too many requests (429), even after waiting. Run the same again later, log in "
            "(`hf auth login`) for a higher limit, or set HF_ENDPOINT to a mirror."
        )
    text = f"it answers {status}" if status else (str(error).splitlines() or [""])[0].rstrip(".")
    return DataError(
        f"cannot reach {what}: {text or type(error).__name__}. Check the network, or set HF_ENDPOINT to a mirror and "
        "run the same again."
    )
