"""The chat app in the browser, and the HTTP API beside it."""

import errno
import socket
import threading
from collections.abc import Callable, Sequence

import gradio as gr

from pipeline.errors import UserError
from pipeline.ui.api import routes
from pipeline.ui.chat import ChatSession
from pipeline.ui.look import CSS, HEAD, theme
from pipeline.ui.models import ModelChoice
from pipeline.ui.page import build_page
from pipeline.ui.sessions import Sessions

RESULT_NEUTRAL = "serves the chat app"


def launch_app(
    models: Sequence[ModelChoice],
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: str = "auto",
    load: Callable[..., ChatSession] = ChatSession.load,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. The first model is loaded before anything is served; `on_ready` is told the address.

    Raises UserError when the port is taken or the address is not this machine's.
    """
    _check_address(host, port)
    sessions = Sessions(models, device, load)
    sessions.get(models[0].key)
    page = build_page(sessions)
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme(),
            css=CSS,
            head=HEAD,
            app_kwargs={"routes": routes(sessions)},
        )
    except OSError as error:  # somebody was faster than we were after the check
        raise _taken(host, port) from error
    on_ready(public or local)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        gr.close_all(verbose=False)


def _check_address(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise _taken(host, port) from None
            why = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {host}, port {port} ({why})", "app.host, app.port") from None


def _taken(host: str, port: int) -> UserError:
    return UserError(
        f"port {port} on {host} is in use", "app.port", f"Choose another, for example app.port={port + 1}."
    )
