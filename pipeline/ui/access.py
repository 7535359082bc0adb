"""Who may use the chat app: the hosts and origins that it answers to, and the secret that opens it."""

import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pipeline.config.compose import AppConfig
from pipeline.errors import UserError

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII | re.IGNORECASE)  # [address] or name, port


class Tries:
    """Wrong secrets of the last minute, bounded for each address and in total."""

    EACH, TOTAL, SECONDS = 10, 100, 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._wrong: deque[tuple[float, str]] = deque()

    def record(self, address: str) -> None:
        self._wrong.append((self._clock(), address))

    def used_up(self, address: str) -> bool:
        while self._wrong and self._wrong[0][0] <= self._clock() - self.SECONDS:
            self._wrong.popleft()
        return len(self._wrong) >= self.TOTAL or sum(who == address for _, who in self._wrong) >= self.EACH


@dataclass
class Access:
    """secret: None lets everybody in. hosts: names to answer to beside the loopback ones; None answers to any."""

    secret: str | None
    hosts: set[str] | None
    origins: Collection[str] = ()
    addresses: bool = False  # answer to any IP address, too: DNS rebinding needs a name
    delay: float = 1.0  # seconds before a wrong secret is answered
    tries: Tries = field(default_factory=Tries)
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))  # what a browser sends afterwards

    @classmethod
    def of(cls, app: AppConfig) -> "Access":
        """The access that the settings ask for. Raises UserError for settings that contradict each other."""
        if app.insecure and app.password:
            raise UserError("needs app.password to be empty", "app.insecure", "Set one of them.")
        secret = None if app.insecure else app.password or secrets.token_urlsafe(24)
        local = is_loopback(app.host)
        # A foreign page whose name was made to point here (DNS rebinding) sends that name. It does not know the secret;
        # so where there is one, and users come by names that are not known here, any name is accepted.
        named = {name.lower() for name in (app.host, socket.gethostname(), *app.hosts)}
        hosts = None if secret and not local else named
        return cls(secret, hosts, tuple(origin.rstrip("/").lower() for origin in app.origins), addresses=not local)

    def knows_host(self, host: str) -> bool:
        name = _hostname(host)
        if self.hosts is None or name in self.hosts or is_loopback(name):
            return True
        return self.addresses and _address(name) is not None

    def knows_origin(self, origin: str, host: str) -> bool:
        """Return True for the page's own server and for listed origins."""
        return origin in self.origins or origin.lower().partition("://")[2] == host.lower()

    def is_secret(self, offered: str) -> bool:
        return self.secret is None or same(offered, self.secret)


def same(offered: str, wanted: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(offered.encode(errors="replace"), wanted.encode(errors="replace"))


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _hostname(host: str) -> str:
    """The name in a Host header, without the port; empty for anything else, as a path in it would mislead parsers."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower().rstrip(".") if found else ""
