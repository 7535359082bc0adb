"""Running code that a model wrote: in a separate process with its own folder, limits, no network and no forks.

Each program gets a fresh process (evals/sandbox_child.py) that confines itself in as many layers as the machine has:
user, network, pid, ipc and mount namespaces, a cgroup of one process, Landlock, a seccomp filter, an unused user id
when started by root, and resource limits. What really holds is found out by trying, once per Sandbox: a machine where
neither the network nor forks can be stopped runs nothing unless it is told that weak is good enough.
"""

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from evals import sandbox_kernel as kernel

Status = Literal["passed", "failed", "timeout", "memory", "killed", "refused"]

_ENDINGS = ("passed", "failed", "timeout", "memory", "killed")  # that the sandbox's process may report
_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 10.0  # for the interpreter to start on a busy machine, on top of a program's own time
_RESULT_BYTES = 1 << 16
_PROBE = """
import os, socket
found = []
try:
    if os.fork() == 0:
        os._exit(0)
    found.append("forks")
except OSError:
    pass
try:
    connection = socket.socket()
    connection.settimeout(1)
    connection.connect(("127.0.0.1", {port}))
    found.append("network")
except OSError:
    pass
print("open:", *found)
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory is address space, which an interpreter takes some 30 MB of by itself."""

    wall_seconds: float = 20.0  # processor time is what counts; this ends those who sleep
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Execution:
    """How one program ended. `output` is what it printed, cut at Limits.output_bytes; `layers` what confined it."""

    status: Status
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    layers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __bool__(self) -> bool:
        return self.passed


@dataclass
class Sandbox:
    """Runs programs one at a time or from several threads at once.

    mode "strict" refuses (Execution.status "refused", with the reason) where network or forks stay open;
    "weak" runs all the same with what layers there are.

    It keeps a program from doing harm. That a program has passed is its own word in the end: one that looks through the
    frames of the interpreter it runs in can say so without being right.
    """

    limits: Limits = field(default_factory=Limits)
    mode: Literal["strict", "weak"] = "strict"
    python: str = sys.executable

    @functools.cached_property
    def weakness(self) -> str:
        """Why strict mode refuses to run programs here; empty when it does not."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            trial = self._execute(_PROBE.format(port=server.getsockname()[1]))
        if not trial.passed:
            return f"a trial program could not run in the sandbox ({trial.status} {trial.detail})".replace(" )", ")")
        still_open = trial.output.partition("open:")[2].split()
        return f"{' and '.join(still_open)} cannot be stopped on this machine" if still_open else ""

    def __call__(self, program: str) -> Execution:
        """Run `program` (Python source) as __main__. It has passed when it reaches its end without an exception."""
        if self.mode == "strict" and self.weakness:
            return Execution("refused", f"{self.weakness}; launch.sandbox=weak runs it all the same")
        return self._execute(program)

    def _execute(self, program: str) -> Execution:
        folder = Path(tempfile.mkdtemp(prefix="sandbox-")).resolve()
        secret, started = secrets.token_hex(8), time.monotonic()
        try:
            with tempfile.TemporaryFile() as output, _cgroup(folder.name) as cgroup:
                reports = self._converse(self._request(program, folder, secret, cgroup), output)
                output.seek(0)
                printed = output.read(self.limits.output_bytes).decode(errors="replace")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = time.monotonic() - started
        layers = tuple(next((report["layers"] for report in reports if "layers" in report), ()))
        ending = next((report for report in reports if report.get("secret") == secret), None)
        if ending is None:
            return Execution("killed", "the sandbox process died", printed, seconds, layers)
        return Execution(ending["status"], ending["detail"], printed, seconds, layers)

    def _request(self, program: str, folder: Path, secret: str, cgroup: Path | None) -> bytes:
        limits = self.limits
        resources = {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,  # counts per user, and every user has a process already: no fork, no thread
        }
        request = {"program": program, "folder": str(folder), "secret": secret, "limits": resources}
        request["cgroup"] = str(cgroup) if cgroup else None
        request |= {"wall_seconds": limits.wall_seconds, "disk_bytes": limits.disk_bytes}
        return json.dumps(request).encode() + b"\n"

    def _converse(self, request: bytes, output: IO[bytes]) -> list[dict]:
        """Start the sandbox process, hand it the request, and collect its reports until all of it is gone."""
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [self.python, "-I", "-S", "-B", str(_CHILD), str(writing)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(writing,),
            env={},
            cwd="/",
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
            data = _read_until(reading, time.monotonic() + self.limits.wall_seconds + _START_SECONDS)
        except BrokenPipeError:
            data = b""
        finally:
            os.close(reading)
            _end(process)
        return [report for line in data.splitlines() if (report := _report(line)) is not None]


@contextlib.contextmanager
def _cgroup(name: str) -> Iterator[Path | None]:
    """A cgroup in which one process may be, for the time being; None where the machine gives us none."""
    try:
        made = kernel.limit_processes(name, 1)
    except OSError:
        yield None
        return
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):  # the sandbox process has done it, unless it was killed
            made.rmdir()


def _read_until(fd: int, deadline: float) -> bytes:
    """All that comes until the other ends are closed, the deadline, or more than reports could fill."""
    data = b""
    while len(data) < _RESULT_BYTES:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        piece = os.read(fd, _RESULT_BYTES)
        if not piece:
            break
        data += piece
    return data


def _report(line: bytes) -> dict | None:
    """What a line says; None for one that the sandbox's process never writes, as a program may write there too."""
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(report, dict):
        return None
    layers = report.get("layers", [])
    says_how = "secret" not in report or (report.get("status") in _ENDINGS and isinstance(report.get("detail"), str))
    names = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
    return report if says_how and names else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Closing its standard input makes the watching process end what it watches; then its group goes."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
