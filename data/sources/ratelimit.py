"""A server that has had enough requests (429) is left alone for as long as it asks, by all connections at once."""

import email.utils
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

FIRST_WAIT_SECONDS = 10.0  # where the server does not say how long; twice as long each further time
LONGEST_WAIT_SECONDS = 300.0  # at once, whatever the server says: the hub counts in windows of five minutes
WAITS = 8  # in a row without a byte of progress


def asked_seconds(error: Exception) -> float | None:
    """How long the server says to wait; 0.0 where it says too many requests and no more; None for other errors.

    Read from Retry-After (RFC 9110: seconds or a date), else from the hub's `RateLimit: "api";r=0;t=55`.
    """
    response = getattr(error, "response", None)
    if response is None or response.status_code not in (429, 503):
        return None
    told = response.headers.get("Retry-After")
    if told is None and response.status_code == 503:
        return None
    reset = re.search(r"\br=0\b.*\bt=(\d+)", response.headers.get("RateLimit", ""))
    return _seconds(told) if told else float(reset.group(1)) if reset else 0.0


def _seconds(retry_after: str) -> float:
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


class Turnstile:
    """What every connection passes before a request; closed while the server wants to be left alone.

    say: is told once each time it closes, however many connections were refused.
    """

    def __init__(self, say: Callable[[str], Any]):
        self._say = say
        self._opens_at = 0.0
        self._lock = threading.Lock()

    def close(self, asked: float, times: int, url: str) -> None:
        """asked: as asked_seconds has it. times: how often in a row this connection has been refused, from 1 on."""
        seconds = min(LONGEST_WAIT_SECONDS, asked or FIRST_WAIT_SECONDS * 2 ** (times - 1))
        with self._lock:
            closed = time.monotonic() < self._opens_at
            self._opens_at = max(self._opens_at, time.monotonic() + seconds)
        if not closed:
            word = "as it asks" if asked == seconds else f"it asks for {asked:.0f}" if asked else "it does not say more"
            self._say(f"{urlsplit(url).netloc} has had too many requests: going on in {seconds:.0f} s ({word})")

    def pass_through(self, stop: threading.Event) -> None:
        """Return when it is open, or `stop` is set."""
        while (left := self._opens_at - time.monotonic()) > 0 and not stop.wait(left):
            pass
