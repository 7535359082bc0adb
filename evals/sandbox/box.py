"""Execution of code that a model wrote: confined, and judged by a process that it cannot reach.

Each program gets two processes (runner.py): the judge runs the check of a task, the answer runs the model's program;
only plain values are exchanged (wire.py). Both are confined by every layer that is available: user, network, pid, ipc
and mount namespaces, a cgroup of one process, Landlock, a seccomp filter, unused user ids when started by root, and
resource limits. Once per Sandbox, a trial program tests the result: where it can reach the network or the user's files,
or start processes, nothing runs unless mode is "weak".
"""

import contextlib
import functools
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.tasks.task import Check
from evals.sandbox import runner, wire

Status = Literal["passed", "failed", "timeout", "memory", "killed", "refused"]

_GRACE_SECONDS = 10.0  # for processes to start and end on a busy machine, on top of a program's own time
_ROOT = str(Path(__file__).resolve().parents[2])
_ZYGOTE = f"import sys; sys.path.append({_ROOT!r}); from {runner.__name__} import main; sys.path.pop(); main()"
_PROBE = """
import os, socket
found = []
try:
    if os.fork() == 0:
        os._exit(0)
    found.append("start processes")
except OSError:
    pass
try:
    connection = socket.socket()
    connection.settimeout(1)
    connection.connect(("127.0.0.1", {port}))
    found.append("reach the network")
except OSError:
    pass
try:
    open({path!r}).close()
    found.append("read your files")
except OSError:
    pass
print("open:", ", ".join(found))
"""


@dataclass(frozen=True)
class Limits:
    """Limits on one program. Memory is address space, of which an interpreter alone takes some 30 MB."""

    wall_seconds: float = 20.0  # for programs that sleep; others reach the limit on processor time first
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Execution:
    """The end of one program. `output` is what it printed, cut at Limits.output_bytes; `layers` what confined it.

    advisory: there was no check, so the program reported its own verdict, which it can forge.
    """

    status: Status
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    layers: tuple[str, ...] = ()
    advisory: bool = False

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __bool__(self) -> bool:
        return self.passed


@dataclass
class Sandbox:
    """Runs programs one at a time or from several threads at once.

    mode "strict" refuses (Execution.status "refused", with the reason) where network, forks or files stay open;
    "weak" runs anyway, with the layers that are available.
    """

    limits: Limits = field(default_factory=Limits)
    mode: Literal["strict", "weak"] = "strict"
    python: str = sys.executable

    @functools.cached_property
    def weakness(self) -> str:
        """The reason why strict mode refuses to run programs here; empty when it does not."""
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as own:
            trial = self._execute(_PROBE.format(port=server.getsockname()[1], path=own.name), None)
        if not trial.passed:
            return f"a trial program could not run in the sandbox ({trial.status} {trial.detail})".replace(" )", ")")
        still_open = trial.output.partition("open:")[2].strip()
        return f"on this machine a program could {still_open}" if still_open else ""

    def __call__(self, program: str, check: Check | None = None) -> Execution:
        """Run `program` (Python source) as __main__, then check(its function) in another process.

        It passes when both end without an exception; without a check, the program itself reports that.
        """
        if self.mode == "strict" and self.weakness:
            return Execution("refused", f"{self.weakness}. Set launch.sandbox=weak to run programs anyway")
        return self._execute(program, check)

    def _execute(self, program: str, check: Check | None) -> Execution:
        folder = Path(tempfile.mkdtemp(prefix="sandbox-", suffix=secrets.token_hex(4))).resolve()
        started = time.monotonic()
        source, function = (check.source, check.function) if check else (None, None)
        case = {"program": program, "check": source, "function": function}
        try:
            with tempfile.TemporaryFile() as output:
                with self._zygote.runner(output.fileno()) as talk:
                    ending = self._converse(talk, folder, case)
                output.seek(0)
                printed = output.read(self.limits.output_bytes).decode(errors="replace")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds, layers = time.monotonic() - started, tuple(ending["layers"])
        return Execution(ending["status"], ending["detail"], printed, seconds, layers, advisory=check is None)

    def _converse(self, talk: socket.socket, folder: Path, case: dict[str, str | None]) -> dict[str, Any]:
        """The runner's report. Closing `talk` ends the runner, and what it runs."""
        limits = self.limits
        resources = {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,  # counts per user, and every user has a process already: no fork, no thread
        }
        bounds = {"wall_seconds": limits.wall_seconds, "disk_bytes": limits.disk_bytes}
        request = {"folder": str(folder), "limits": resources} | bounds
        try:
            wire.send(talk.fileno(), request)
            wire.send(talk.fileno(), case)
            if select.select([talk], [], [], limits.wall_seconds + _GRACE_SECONDS)[0]:
                return wire.receive(talk.fileno())
        except wire.NotPlain as error:  # a program of many megabytes
            return {"status": "failed", "detail": str(error), "layers": []}
        except wire.Lost:
            pass
        return {"status": "killed", "detail": "the sandbox process died", "layers": []}

    @functools.cached_property
    def _zygote(self) -> "_Zygote":
        return _Zygote(self.python)


class _Zygote:
    """The process that forks runners. It is started when first needed, and again if it has died."""

    def __init__(self, python: str) -> None:
        self.python = python
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [self.python, "-I", "-S", "-B", "-c", _ZYGOTE],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        self._close = weakref.finalize(self, _end, self._requests, self._process)

    def runner(self, output: int) -> socket.socket:
        """A connection to a new runner, whose program prints to `output`."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                socket.send_fds(self._requests, [b"1"], [theirs.fileno(), output])
            except OSError:
                self._close()
                self._start()
                socket.send_fds(self._requests, [b"1"], [theirs.fileno(), output])
        return ours


def _end(requests: socket.socket, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        requests.shutdown(socket.SHUT_RDWR)  # also for forks of this process, which have the socket, too
    requests.close()
    process.kill()
    process.wait()
