"""The door of the chat app: ASGI middleware around everything that is served, Gradio's own routes included.

Checked in this order: Host and Origin, the route, the announced length, the secret, the length of what arrives.
"""

import re
from collections.abc import Callable
from urllib.parse import parse_qs

import anyio
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.trust import shown
from pipeline.ui.access import Access, same

BODY_BYTES = 1 << 20  # of a request
LOGIN_BYTES = 1 << 12  # of the login form, which anybody may send
LEFT_BYTES, LEFT_SECONDS = 1 << 28, 30.0  # of a refused request, which are received and thrown away

# Of what Gradio offers, what a chat needs: no uploads, no files, no proxy, no recordings, no page about itself.
READ = re.compile(
    r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./-]+"
    r"|/gradio_api/(heartbeat/\w+|queue/data|app_id)|/api/\w+"
)
SENT = re.compile(r"/gradio_api/(queue/join|cancel|reset)|/api/\w+|/login")
EVENT = "/gradio_api/queue/join"
OPEN = ("/login", "/favicon.ico", "/manifest.json")  # a browser asks for the last two without any cookie

FORM = "application/x-www-form-urlencoded"

# Images, fonts, scripts and forms that a model's text names reach no other server. Gradio's page has scripts in it
# and builds functions from text.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # under no-referrer the login form would have the origin "null"
}

LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Chatmill</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">
<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;
min-height:100dvh;margin:0}form{width:min(22rem,88vw)}h1{font-size:1.3rem}p{opacity:.75}
input,button{font:inherit;padding:.6rem .9rem;border-radius:.7rem;border:1px solid #8886;box-sizing:border-box;
width:100%;margin:.25rem 0}button{background:#0d9488;color:#fff;border:0}</style>
<form method="post" action="login"><h1>Chatmill</h1><p>SAID</p>
<input type="password" name="password" aria-label="Password" autocomplete="current-password" autofocus required>
<button>Open</button></form></html>"""
ASK = "Enter the password, or open the link that <code>flows.py chat</code> printed."
# Not a redirect: after a click in another site's page (a chat, a mail) that would be sent without the new cookie.
OPENED = '<!doctype html><title>Chatmill</title><meta http-equiv="refresh" content="0; url=./">'


class Gate:
    """cookie_name: cookies do not know ports, so that two apps on one host need two names.

    mistake_of: what is wrong with the body of a Gradio event, or None.
    """

    def __init__(self, app: ASGIApp, access: Access, cookie_name: str, mistake_of: Callable[[bytes], str | None]):
        self.app, self.access, self.cookie_name, self.mistake_of = app, access, cookie_name, mistake_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
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
        """What is wrong with where a request comes from or goes to, or how long it is, or None."""
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
        # Pages of other hosts can send forms and text here, but JSON only with this server's permission (CORS).
        if request.method == "POST" and kind != (FORM if path == "/login" else "application/json"):
            return _error(415, "send application/json")
        return None

    async def _ask_secret(self, request: Request) -> Response | None:
        """None if the request may pass."""
        token = request.query_params.get("token") if request.scope["path"] == "/" else None
        if self.access.secret is None or request.scope["path"] in OPEN:
            return None
        if same(request.cookies.get(self.cookie_name, ""), self.access.cookie):
            return None if token is None else RedirectResponse("./", 303)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        offered = token if token is not None else bearer.strip() if scheme.lower() == "bearer" else None
        refusal = _login(request, ASK) if offered is None else await self._try(request, offered)
        return refusal or (None if token is None else self._opened(HTMLResponse(OPENED)))

    async def _log_in(self, request: Request, body: bytes) -> Response:
        offered = parse_qs(body.decode(errors="replace")).get("password", [""])[0]
        return await self._try(request, offered) or self._opened(RedirectResponse("./", 303))

    async def _try(self, request: Request, offered: str) -> Response | None:
        """None for the right secret. A wrong one is answered slowly; after several, every secret is refused."""
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
    """The whole body; None if it is too long, the rest unread. Raises ClientDisconnect."""
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
    """Answer at once, and end the answer when the rest of the body is there or has become too long: many clients look
    for an answer only after they have sent everything, and find none on a closed connection."""

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
    """A replacement for `receive`: it gives the body that was read, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
