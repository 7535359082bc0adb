"""Access to the chat app: ASGI middleware around everything that is served, including Gradio's own routes.

Checked in this order: Host and Origin, the route, the announced length, the secret, the length of what arrives.
"""

import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

import anyio
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.trust import shown
from pipeline.config.settings import AppConfig
from pipeline.errors import UserError

BODY_BYTES = 1 << 20  # of a request
LOGIN_BYTES = 1 << 12  # of the login form, which anybody may send
LEFT_BYTES, LEFT_SECONDS = 1 << 28, 30.0  # of a refused request, received and discarded

# The routes of Gradio that a chat needs: no uploads, files, proxy, recordings or page about itself.
READ = re.compile(
    r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./-]+"
    r"|/gradio_api/(heartbeat/\w+|queue/data|app_id)|/api/\w+"
)
SENT = re.compile(r"/gradio_api/(queue/join|cancel|reset)|/api/\w+|/login")
EVENT = "/gradio_api/queue/join"
OPEN = ("/login", "/favicon.ico", "/manifest.json")  # a browser asks for the last two without any cookie

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII | re.IGNORECASE)  # [address] or name, port
FORM = "application/x-www-form-urlencoded"

# Images, fonts, scripts and forms in a model's text must not reach other servers. Gradio's page contains inline scripts
# and builds functions from text, hence the two "unsafe" words.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # under no-referrer the login form would have the origin "null"
}

LOGIN = Path(__file__).with_name("login.html").read_text()  # SAID stands for a message
ASK = "Enter the password, or open the link that <code>flows.py chat</code> printed."
# Not a redirect: after a click in another site's page (a chat, a mail) that would be sent without the new cookie.
OPENED = '<!doctype html><title>Chatmill</title><meta http-equiv="refresh" content="0; url=./">'


class Tries:
    """Limits how many wrong secrets are accepted per minute, from one address and in total."""

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
    """secret: None lets everybody in. hosts: host names to answer to besides loopback; None answers to any."""

    secret: str | None
    hosts: set[str] | None
    origins: Collection[str] = ()
    addresses: bool = False  # also answer to any IP address: DNS rebinding needs a name
    delay: float = 1.0  # seconds until a wrong secret is answered
    tries: Tries = field(default_factory=Tries)
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))  # what a browser sends afterwards

    @classmethod
    def of(cls, app: AppConfig) -> "Access":
        """The access that the settings ask for. Raises UserError for settings that contradict each other."""
        if app.insecure and app.password:
            raise UserError("needs app.password to be empty", "app.insecure", "Set only one of them.")
        secret = None if app.insecure else app.password or secrets.token_urlsafe(24)
        local = is_loopback(app.host)
        # With DNS rebinding, a foreign page makes its own host name point here, and sends that name. It does not know
        # the secret. So with a secret any name is accepted on other addresses, whose names are not known here.
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
        return self.secret is None or _same(offered, self.secret)


def _same(offered: str, wanted: str) -> bool:
    """Compare in constant time."""
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
    """The name in a Host header, without the port. Empty for anything else, as a path in it would mislead parsers."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower().rstrip(".") if found else ""


class Gate:
    """cookie_name: differs for each app on a host, because cookies ignore ports.

    mistake_of: returns what is wrong with the body of a Gradio event, or None.
    """

    def __init__(self, app: ASGIApp, access: Access, cookie_name: str, mistake_of: Callable[[bytes], str | None]):
        self.app, self.access, self.cookie_name, self.mistake_of = app, access, cookie_name, mistake_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # not used here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request, limit = Request(scope), LOGIN_BYTES if scope["path"] == "/login" else BODY_BYTES
        unread = request.method == "POST"
        refusal = self._refuse(request, limit) or await self._ask_secret(request)
        if refusal is None and unread:
            try:
                body = await _read(receive, limit)
            except ClientDisconnect:
                return
            unread = body is None
            if body is None:
                refusal = _too_long(limit)
            elif request.scope["path"] == "/login":
                refusal = await self._log_in(request, body)
            elif request.scope["path"] == EVENT and (mistake := self.mistake_of(body)):
                refusal = _error(400, mistake)
            else:
                receive = _again(body, receive)
        if refusal and unread:
            await _answer_early(refusal, scope, receive, guarded)
        else:
            await (refusal or self.app)(scope, receive, guarded)

    def _refuse(self, request: Request, limit: int) -> Response | None:
        """Check host, origin, route, announced length and content type. None if they are allowed."""
        headers, path = request.headers, request.scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.access.knows_host(host):
            return _error(403, f"this server does not answer to the host name {shown(host)}. Add it to app.hosts")
        if origin is not None and not self.access.knows_origin(origin, host):
            return _error(403, f"requests from {shown(origin)} are not allowed. Add the origin to app.origins")
        served = {"GET": READ, "HEAD": READ, "POST": SENT}.get(request.method)
        if served is None or not served.fullmatch(path) or ".." in path:
            return _error(404, "there is nothing here")
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > limit:
            return _too_long(limit)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Pages of other hosts can send forms and text, but JSON only with this server's permission (CORS).
        if request.method == "POST" and kind != (FORM if path == "/login" else "application/json"):
            return _error(415, "send application/json")
        return None

    async def _ask_secret(self, request: Request) -> Response | None:
        """Check the secret. None if the request may pass."""
        token = request.query_params.get("token") if request.scope["path"] == "/" else None
        if self.access.secret is None or request.scope["path"] in OPEN:
            return None
        if _same(request.cookies.get(self.cookie_name, ""), self.access.cookie):
            return None if token is None else RedirectResponse("./", 303)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        offered = token if token is not None else bearer.strip() if scheme.lower() == "bearer" else None
        refusal = _login(request, ASK) if offered is None else await self._try(request, offered)
        return refusal or (None if token is None else self._opened(HTMLResponse(OPENED)))

    async def _log_in(self, request: Request, body: bytes) -> Response:
        offered = parse_qs(body.decode(errors="replace")).get("password", [""])[0]
        return await self._try(request, offered) or self._opened(RedirectResponse("./", 303))

    async def _try(self, request: Request, offered: str) -> Response | None:
        """None for the right secret. A wrong one is answered after a delay; after several, every secret is refused."""
        address = request.client.host if request.client else ""
        if self.access.tries.used_up(address):
            return _login(request, "Too many wrong passwords. Wait a minute.", 429)
        if self.access.is_secret(offered):
            return None
        self.access.tries.record(address)
        await anyio.sleep(self.access.delay)
        return _login(request, "That is not the password.")

    def _opened(self, response: Response) -> Response:
        response.set_cookie(self.cookie_name, self.access.cookie, httponly=True, samesite="strict")
        return response


def _login(request: Request, said: str, status: int = 401) -> Response:
    """The login page for a browser, JSON for programs."""
    headers = {"www-authenticate": "Bearer"} if status == 401 else {"retry-after": "60"}
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(LOGIN.replace("SAID", said), status, headers | {"cache-control": "no-store"})
    fix = "Send the header `Authorization: Bearer TOKEN`, with app.password or the token of the start-up link."
    return JSONResponse({"error": f"{said} {fix}" if said != ASK else fix}, status, headers)


def _error(status: int, said: str) -> Response:
    return JSONResponse({"error": said}, status)


def _too_long(limit: int) -> Response:
    return _error(413, f"the request is longer than {limit:,} bytes")


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None, with the rest unread, if it is too long. Raises ClientDisconnect."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


async def _answer_early(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, but end the answer only when the rest of the body has arrived or is too long: many clients read
    an answer only after they have sent everything, and find none on a closed connection."""

    async def unended(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await refusal(scope, receive, unended)
    left = LEFT_BYTES
    with anyio.move_on_after(LEFT_SECONDS):
        while left > 0:
            message = await receive()
            left = left - len(message.get("body", b"")) if message.get("more_body") else 0
    await send({"type": "http.response.body"})


def _again(body: bytes, receive: Receive) -> Receive:
    """A replacement for `receive` that returns the body that was read, then what follows it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
