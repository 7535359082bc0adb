"""Prefect's server: the one that the user has configured, or a temporary one for the time of a command.

Prefect would start one of its own, but in our process group, where Ctrl-C ends it before the flow can say how it went,
without an end when this process is killed, and without help when the server is. The temporary one has a session of its
own, ends when a pipe from us closes, and is started again on the same port and database when it ends before that.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from pipeline.errors import Interrupted, Unreachable, UserError

START_SECONDS = 180.0  # the first start ever sets up a database, and others may do so before it
STARTS = 3  # in a row that may fail
ANSWER_SECONDS = 15.0  # for a configured server to answer
POLL_SECONDS, POLL_TIMEOUT = 1.0, 5.0
SILENT_SECONDS = 60.0  # without an answer: a temporary server is started again, a configured one is given up
DRAIN_SECONDS = 10.0  # for a temporary server to write down what it was last sent
UNSET = "run `prefect config unset PREFECT_API_URL`, or unset the variable, to use a temporary server."
APP = "prefect.server.api.server:create_app"
DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def set_defaults() -> None:
    """Settings of Prefect where the user has none. Call it before Prefect is imported."""
    if not os.environ.get("PREFECT_API_URL", "").strip():  # Prefect does not treat empty as unset
        os.environ.pop("PREFECT_API_URL", None)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def configured_url() -> str:
    """The URL of the server that the user has configured; empty if none. Imports Prefect if a file may name one."""
    if url := os.environ.get("PREFECT_API_URL", "").strip():
        return "" if TemporaryServer.running and url == TemporaryServer.running.url else url
    set_defaults()
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    marks = {profiles: "PREFECT_API_URL", Path(".env"): "PREFECT_API_URL"}
    marks |= {Path("prefect.toml"): "", Path("pyproject.toml"): "tool.prefect"}
    for path, mark in marks.items():
        with suppress(OSError, UnicodeDecodeError):
            if mark in path.read_text():
                from prefect.settings import get_current_settings

                return get_current_settings().api.url or ""
    return ""


class Server:
    """A server and when it last answered, which a thread asks all the time until close()."""

    def __init__(self, url: str):
        self.url = url
        self.heard = time.monotonic()
        self._closed = threading.Event()

    def watch(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @property
    def silent_seconds(self) -> float:
        """How long it has not answered; 0 while it does."""
        silent = time.monotonic() - self.heard
        return silent if silent > POLL_TIMEOUT + 3 * POLL_SECONDS else 0.0

    def answers(self, seconds: float) -> bool:
        import httpx

        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=seconds, verify=False).status_code < 500
        return False

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if self.answers(POLL_TIMEOUT):
                self.heard = time.monotonic()


class ConfiguredServer(Server):
    """Raises Unreachable if nothing answers at the configured URL, UserError if something other than Prefect does."""

    def __init__(self, url: str):
        super().__init__(url.rstrip("/"))
        import httpx

        try:
            # Prefect's own client verifies certificates, as its settings say.
            answer = httpx.get(f"{self.url}/health", timeout=ANSWER_SECONDS, verify=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"PREFECT_API_URL={url}: no server answers ({error}). Start it, or {UNSET}") from None
        if answer.status_code == 404 or (answer.is_success and answer.text.strip() != "true"):
            raise UserError(
                "is not Prefect's API, whose URL ends in /api", f"PREFECT_API_URL={url}", f"Correct it, or {UNSET}"
            )


class TemporaryServer(Server):
    """A server that ends with this process, however that ends. The runs of a sweep share it."""

    running: ClassVar["TemporaryServer | None"] = None
    patience = SILENT_SECONDS

    def __init__(self, say: Callable[[str], None], stopping: Callable[[], bool]):
        """Start it. Raises Unreachable if it does not start, Interrupted if the run is to stop before it has."""
        self.say = say
        self.listener = socket.socket()  # open as long as we live, so that connections wait for the next server
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        super().__init__(f"http://127.0.0.1:{self.listener.getsockname()[1]}/api")
        self.log = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "chatmill-server.log"
        self.process = self._launch()
        for left in reversed(range(STARTS)):
            deadline = time.monotonic() + START_SECONDS
            while self.process.poll() is None and time.monotonic() < deadline:
                if self.answers(POLL_SECONDS):
                    self.heard = time.monotonic()
                    return
                if stopping():
                    self.process.kill()
                    raise Interrupted("")
                time.sleep(0.1)
            self.process.kill()
            if left:
                self.process = self._launch()
        raise Unreachable(f"Prefect's temporary server does not start. Its log is {self.log}")

    @classmethod
    def shared(cls, say: Callable[[str], None], stopping: Callable[[], bool]) -> "TemporaryServer":
        """The one of this process, which is started if there is none."""
        if cls.running is None or cls.running.process.poll() is not None:
            cls.running = cls(say, stopping)
            cls.running.watch()
        cls.running.say, cls.running.patience = say, SILENT_SECONDS
        return cls.running

    def close(self) -> None:
        super().close()
        self.process.kill()

    def answers(self, seconds: float) -> bool:
        import urllib.request  # takes time that only a run has

        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError):
            return bool(direct.open(f"{self.url}/health", timeout=seconds).read())
        return False

    def _launch(self) -> "subprocess.Popen[bytes]":
        leash, held = os.pipe()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.runner.server", str(self.listener.fileno()), str(leash)],
                cwd=Path(__file__).resolve().parents[2],
                env=os.environ | DEFAULTS | {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
                pass_fds=(self.listener.fileno(), leash),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(leash)
        self.held = held  # not inherited: open in this process alone, until it ends
        return process

    def _watch(self) -> None:
        failed = 0
        while not self._closed.wait(POLL_SECONDS) and failed < STARTS:
            if self.process.poll() is None and self.answers(POLL_TIMEOUT):
                self.heard, failed = time.monotonic(), 0
            elif self._closed.is_set():
                return
            elif self.process.poll() is not None or self.silent_seconds > self.patience:
                self.process.kill()
                how = signal.Signals(-code).name if (code := self.process.wait()) < 0 else f"exit code {code}"
                self.say(f"Prefect's temporary server ended ({how}) and is started again.")
                os.close(self.held)
                self.process, self.heard, failed = self._launch(), time.monotonic(), failed + 1


# --- the temporary server's own process


def serve(listener: int, leash: int) -> None:
    """Serve on an open socket until the other end of the pipe is closed."""
    import uvicorn

    class OneAtATime(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Set the database up, which several first starts at once would do at once, and fail."""
            from prefect.settings import get_current_settings

            home = Path(get_current_settings().home)
            home.mkdir(parents=True, exist_ok=True)
            with open(home / "chatmill-server.lock", "w") as lock:
                with suppress(OSError):  # a file system without locks: starts that fail are tried again
                    fcntl.flock(lock, fcntl.LOCK_EX)
                await super().startup(sockets)

    server = OneAtATime(uvicorn.Config(APP, factory=True, fd=listener, log_level="error", timeout_graceful_shutdown=3))

    def end_with() -> None:
        os.read(leash, 1)
        server.should_exit = True
        time.sleep(DRAIN_SECONDS)
        os._exit(0)

    threading.Thread(target=end_with, daemon=True).start()
    server.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
