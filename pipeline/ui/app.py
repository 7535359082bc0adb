"""The chat app: the page in the browser and the HTTP API, as one server behind one gate."""

import errno
import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from gradio.components import Component
from pydantic_core import from_json

from pipeline.config.settings import AppConfig
from pipeline.errors import UserError
from pipeline.ui.api import routes
from pipeline.ui.chat import ChatSession
from pipeline.ui.gate import Access, Gate
from pipeline.ui.look import CSS, HEAD, theme
from pipeline.ui.models import ModelChoice, Sessions
from pipeline.ui.page import build_page

CONNECTIONS = 512  # at once; further ones are answered with 503
EVERYWHERE = ("0.0.0.0", "::")  # addresses to listen on, but not to open

# Events whose handlers are passed a value of this type besides the values of components.
DETAILS = {"example_select": gr.SelectData, "retry": gr.RetryData, "undo": gr.UndoData, "edit": gr.EditData}


def launch_app(
    models: Sequence[ModelChoice],
    settings: AppConfig,
    device: str = "auto",
    load: Callable[..., ChatSession] = ChatSession.load,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. The first model is loaded before anything is served; then `on_ready` is passed the link.

    Raises UserError if the port is in use or the address is not this machine's.
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
                proxy_headers=False,  # or clients could choose the address that their wrong secrets are counted for
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
    """The page at /, the API at /api, and the gate around both."""
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
    """Replaces FastAPI's own answer, which repeats what was sent and fails for values such as infinity."""
    return JSONResponse({"error": "not a request of this page"}, status_code=422)


class _Server(uvicorn.Server):
    """Logs errors of this program, but not of clients."""

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
    """A listening socket, opened first so that the port stays ours while a model is loaded."""
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
    from gradio.networking import setup_tunnel

    port = listening.getsockname()[1]
    try:
        found = urlsplit(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))
    except Exception as error:  # a downloaded program and three servers are involved
        raise UserError(f"no public link could be made ({error})", "app.share", "Use `ssh -L` instead.") from error
    if access.hosts is not None:
        access.hosts.add(str(found.hostname))
    return f"https://{found.netloc}"


def find_mistake(blocks: gr.Blocks, sent: bytes) -> str | None:
    """Check an event for Gradio. Returns what is wrong with it, or None.

    Gradio answers a malformed event with a traceback, so that events are checked before it sees them.
    """
    try:
        event = from_json(sent)
        function, values = blocks.fns[event["fn_index"]], event["data"]
        if function.fn is None:
            return "the server does not handle this event"
        if len(values) != len(function.inputs) or event.get("batched"):
            return f"expected {len(function.inputs)} values"
        for component, value in zip(function.inputs, values, strict=True):
            # The value of a State never leaves the server.
            if isinstance(component, Component) and not isinstance(component, gr.State):
                component.preprocess(value)
        for _, name in function.targets:
            if name in DETAILS:
                _check_detail(name, DETAILS[name](None, event.get("event_data")))
    except Exception as error:  # components raise any type for an unexpected value
        return f"not an event of this page ({type(error).__name__}: {str(error)[:200]})"
    return None


def _check_detail(name: str, detail: Any) -> None:
    """Raises TypeError, KeyError."""
    index = detail.index[0] if isinstance(detail.index, list) else detail.index
    if not isinstance(index, int):
        raise TypeError("the index is not a number")
    if name == "example_select":
        detail.value["text"].strip()
