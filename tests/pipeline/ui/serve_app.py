"""The chat app with the if-statements model, in a process of its own."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

SERVE = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from echo_model import ByteTokenizer, EchoModel
from pipeline.config.settings import AppConfig
from pipeline.errors import UserError
from pipeline.ui.app import launch_app
from pipeline.ui.chat import ChatSession
from pipeline.ui.models import ModelChoice
models = [ModelChoice("rl · mill", "aaaa1111", Path("a"), Path("t"), "1 M parameters", ("What is 3+4?",)),
          ModelChoice("sft · mill", "bbbb2222", Path("b"), Path("t"))]
settings = AppConfig(**{settings!r})
try:
    launch_app(models, settings, load=lambda *_: ChatSession(EchoModel(), ByteTokenizer(), {context}))
except UserError as error:
    sys.exit(str(error))
"""


class App:
    """A running app: the link that it printed, the address and the token in that, and requests to it."""

    def __init__(self, link: str):
        self.link = link
        self.address, _, self.token = link.rstrip("/").partition("/?token=")

    def open(self, path: str, body: Any = None, timeout: float = 30, **headers: str) -> Any:
        """The answer to a GET, or to a POST of JSON, to read from."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        request = urllib.request.Request(self.address + path, data, usual | headers)
        return urllib.request.urlopen(request, timeout=timeout)

    def send(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and text."""
        try:
            with self.open(path, body, **headers) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def serve(context: int = 400, **settings: Any) -> "subprocess.Popen[str]":
    """A chat app with these settings of `app`; its first line is the link to open."""
    code = SERVE.format(
        root=str(ROOT), here=str(Path(__file__).parent), context=context, settings={"port": 0} | settings
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-u", "-c", code], text=True, **pipes)


@contextmanager
def running(**settings: Any) -> Iterator[App]:
    """Whatever was sent to it, it has nothing to say by its end."""
    process = serve(**settings)
    try:
        link = process.stdout.readline().strip()
        assert link, process.stderr.read()
        yield App(link)
    finally:
        process.kill()
        _, said = process.communicate()
    assert said == "", said
