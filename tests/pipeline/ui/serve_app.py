"""The chat app with the if-statements model, in a process of its own."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

SERVE = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from echo_model import ByteTokenizer, EchoModel
from pipeline.errors import UserError
from pipeline.ui.app import launch_app
from pipeline.ui.chat import ChatSession
from pipeline.ui.models import ModelChoice
models = [ModelChoice("rl · mill", "aaaa1111", Path("a"), Path("t"), "1 M parameters", ("What is 3+4?",)),
          ModelChoice("sft · mill", "bbbb2222", Path("b"), Path("t"))]
try:
    launch_app(models, "127.0.0.1", int(sys.argv[1]), load=lambda *_: ChatSession(EchoModel(), ByteTokenizer(), 400))
except UserError as error:
    sys.exit(str(error))
"""


def serve(port: int) -> "subprocess.Popen[str]":
    code = SERVE.format(root=str(ROOT), here=str(Path(__file__).parent))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-u", "-c", code, str(port)], text=True, **pipes)


@contextmanager
def running() -> Iterator[str]:
    """The address of a running app."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = serve(port)
    try:
        address = process.stdout.readline().strip()
        assert address, process.stderr.read()
        yield address.rstrip("/")
    finally:
        process.kill()
        process.communicate()
