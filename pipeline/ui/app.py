"""The chat app: the page in the browser and the HTTP API, as one server behind one gate."""

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from urllib.parse import urlsplit

import gradio as gr
import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from pipeline.config.compose import AppConfig
from pipeline.errors import UserError
from pipeline.ui.access import Access
from pipeline.ui.api import routes
from pipeline.ui.chat import ChatSession
from pipeline.ui.events import find_mistake
from pipeline.ui.gate import Gate
from pipeline.ui.look import CSS, HEAD, theme
from pipeline.ui.models import ModelChoice
from pipeline.ui.page import build_page
from pipeline.ui.sessions import Sessions

CONNECTIONS = 512  # at a time; others are answered 503
EVERYWHERE = ("0.0.0.0", "::")  # addresses to listen on, but not to open


def launch_app(
    models: Sequence[ModelChoice],
    settings: AppConfig,
    device: str = "auto",
    load: Callable[..., ChatSession] = ChatSession.load,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. The first model is loaded before anything is served; `on_ready` is passed the link to open.

    Raises UserError when the port is taken or the address is not this machine's.
    """
    access = Access.of(settings)
    with _listen(settings) as listening:
        port = listening.getsockname()[1]
        sessions = Sessions(models, device, load)
        sessions.get(models[0].key)
        server = _Server(
            uvicorn.Config(
                build_app(sessions, access, f"chatmill-{port}"),
                log_level="error",
                ws="none",
                proxy_headers=False,  # or clients could choose the address that their wrong secrets count for
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        address = _share(listening, access) if settings.share else _address(settings.host, port)
        generated = access.secret if access.secret != settings.password else None
        on_ready(f"{address}/?token={generated}" if generated else address)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def build_app(sessions: Sessions, access: Access, cookie_name: str) -> FastAPI:
    """The page at /, the API at /api, and the gate before both."""
    app, page = FastAPI(routes=routes(sessions), openapi_url=None), build_page(sessions)
    gr.mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, show_error=False, ssr_mode=False, enable_monitoring=False,
        pwa=False, mcp_server=False, theme=theme(), css=CSS, head=HEAD,
        app_kwargs={"exception_handlers": {RequestValidationError: _refuse}},
    )  # fmt: skip
    app.add_middleware(Gate, access=access, cookie_name=cookie_name, mistake_of=partial(find_mistake, page))
    # Outermost, since a browser's preflight request carries no secret.
    headers, methods = ["authorization", "content-type"], ["GET", "POST"]
    app.add_middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=methods, allow_headers=headers)
    return app


def _refuse(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own answer repeats what was sent, and fails for what JSON cannot express, such as infinity."""
    return JSONResponse({"error": "not a request of this page"}, status_code=422)


class _Server(uvicorn.Server):
    """Logs errors of this program, but not those of clients."""

    log = logging.getLogger("uvicorn.error")

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        self.log.addFilter(_is_ours)
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.log.disabled = True  # answers are cut off now
        super().handle_exit(sig, frame)


def _is_ours(record: logging.LogRecord) -> bool:
    """Return False for a second answer to a request that was not valid HTTP: uvicorn has answered it already."""
    return not (record.exc_info and isinstance(record.exc_info[1], h11.LocalProtocolError))


def _listen(settings: AppConfig) -> socket.socket:
    """A socket at the address, so that nobody else can take it while a model is loaded."""
    host, port = settings.host, settings.port
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            fix = f"Choose another, for example app.port={port + 1}."
            raise UserError(f"port {port} on {host} is in use", "app.port", fix) from None
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({why})", "app.host, app.port") from None
    return found


def _address(host: str, port: int) -> str:
    host = socket.gethostname() if host in EVERYWHERE else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _share(listening: socket.socket, access: Access) -> str:
    """A public address that leads here. Raises UserError."""
    import secrets

    from gradio.networking import setup_tunnel

    port = listening.getsockname()[1]
    try:
        found = urlsplit(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))
    except Exception as error:  # a program from elsewhere and three servers may raise anything
        raise UserError(f"no public link could be made ({error})", "app.share", "Use `ssh -L` instead.") from error
    if access.hosts is not None:
        access.hosts.add(str(found.hostname))
    return f"https://{found.netloc}"
