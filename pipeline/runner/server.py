"""A Prefect server for the time of one command, for those who have configured none.

Prefect would start one of its own, but in our process group, where Ctrl-C ends it before the flow can say how it went,
and without an end when this process is killed. This one has a session of its own and ends when a pipe from us closes.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from pipeline.errors import StageFailed, Unreachable, UserError

PATIENCE_SECONDS = 180.0  # the first start ever sets up a database
ANSWER_SECONDS = 15.0  # for a configured server to answer
UNSET = "run `prefect config unset PREFECT_API_URL`, or unset the variable, to use a temporary server."
APP = "prefect.server.api.server:create_app"


def use_configured_or_temporary() -> None:
    """Let Prefect talk to the server that the user has configured, else to a temporary one. Imports Prefect."""
    for name, value in {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if not os.environ.get("PREFECT_API_URL", "").strip():  # Prefect does not treat empty as unset
        os.environ.pop("PREFECT_API_URL", None)
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    if url := get_current_settings().api.url:
        _check(url)
    else:
        os.environ["PREFECT_API_URL"] = start()
        refresh_global_settings_context()


def _check(url: str) -> None:
    """Raises Unreachable if nothing answers at the configured URL, UserError if something other than Prefect does."""
    import httpx

    try:
        # Prefect's own client verifies certificates, as its settings say.
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=ANSWER_SECONDS, verify=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"PREFECT_API_URL={url}: no server answers ({error}). Start it, or {UNSET}") from None
    if answer.status_code == 404 or (answer.is_success and answer.text.strip() != "true"):
        raise UserError(
            "is not Prefect's API, whose URL ends in /api", f"PREFECT_API_URL={url}", f"Correct it, or {UNSET}"
        )


def start() -> str:
    """Start the server; it ends with this process, however that ends. Returns the URL of its API."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        leash, held = os.pipe()
        server = subprocess.Popen(
            [sys.executable, "-m", "pipeline.runner.server", str(listener.fileno()), str(leash)],
            cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
            env=os.environ | {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
            pass_fds=(listener.fileno(), leash),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    os.close(leash)
    os.set_inheritable(held, False)  # stays open, in this process alone, until it ends
    _wait_until_it_answers(server, url)
    return url


def _wait_until_it_answers(server: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5).read()
            return
        except (OSError, urllib.error.URLError):
            if server.poll() is not None:
                break
            time.sleep(0.1)
    server.kill()
    raise StageFailed("prefect", "unknown", "its server does not start; `prefect server start` shows why")


def serve(listener: int, leash: int) -> None:
    """The server's process: serves on an open socket until the other end of the pipe is closed."""
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    import uvicorn

    uvicorn.run(APP, factory=True, fd=listener, log_level="critical")


def _end_with(leash: int) -> None:
    os.read(leash, 1)
    os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
