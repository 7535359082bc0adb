"""One program's run: isolates itself, starts the judge and the answer as confined processes, watches over both.

Its caller has the other end of `talk`: when that closes, everything here ends. Only the standard library is available.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from evals.sandbox import answer, cell, judge, kernel, wire

_FOLDER_CHECK_SECONDS = 0.1
_TICK_SECONDS = 0.01
_PROGRAMS_USE = (
    "typing math cmath re string random itertools functools collections heapq bisect operator statistics copy datetime "
    "decimal fractions hashlib json calendar textwrap abc dataclasses enum io contextlib array struct traceback socket "
    "time threading csv pickle inspect numbers types unittest uuid zlib base64 pprint difflib queue secrets"
)


def main() -> None:
    """A bare interpreter that has imported what programs use, and forks runners: ten times as fast as starting them.

    It reads no program and no check, so what it forks has none in its memory. Requests come as pairs of file
    descriptors over standard input, a socket; it ends when that closes.
    """
    for name in _PROGRAMS_USE.split():
        importlib.import_module(name)
    gc.freeze()
    os.umask(0o022)
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # exit codes of runners are not needed
    while True:
        byte, fds, _, _ = socket.recv_fds(requests, 1, 2)
        if not byte:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(*fds)
        for fd in fds:
            os.close(fd)


def serve(talk: int, output: int) -> None:
    """Run the program that `talk` describes, printing to `output`, and send the result. Does not return.

    First {"folder", "limits", "wall_seconds", "disk_bytes"} is received, then the case that judge.verdict takes: only
    once the process that runs the answer exists, so that its memory never contains the check.
    """
    try:
        ending = Run(talk, output, wire.receive(talk)).ending()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the caller may be gone
        wire.send(talk, ending)
    finally:
        os._exit(0)


class Run:
    def __init__(self, talk: int, output: int, request: dict[str, Any]) -> None:
        self.talk, self.output, self.request = talk, output, request
        self.folder: str = request["folder"]
        self.layers: list[str] = []
        self.running: list[int] = []
        self.deadline = float("inf")

    def ending(self) -> dict[str, Any]:
        """{"status", "detail", "layers"}"""
        users = cell.unused_users()
        os.chown(self.folder, users[0], -1)
        with cell.cgroup(os.path.basename(self.folder)) as cgroup:
            self._isolate(users[0])
            cases, questions, replies, verdicts, confined = (os.pipe() for _ in range(5))

            def be_the_judge() -> None:
                cell.confine(None, self.request["limits"], users[1])
                kernel.hide_memory()
                judge.main(cases[0], questions[1], replies[0], verdicts[1])

            def be_the_answer() -> None:
                os.dup2(self.output, 1)
                os.dup2(self.output, 2)
                layers = cell.enter_cgroup(cgroup) + cell.confine(self.folder, self.request["limits"], users[0])
                wire.send(confined[1], layers)
                os.close(confined[1])
                answer.main(questions[0], replies[1])

            # The judge comes before the pid namespace, which goes with the answer.
            judging = cell.start(be_the_judge, cases[0], questions[1], replies[0], verdicts[1])
            self._attempt("pid", kernel.unshare, "pid")
            kept = [] if cgroup is None else [cgroup]
            answering = cell.start(be_the_answer, self.output, questions[0], replies[1], confined[1], *kept)
            self.running = [answering, judging]
            for fd in (cases[0], *questions, *replies, verdicts[1], confined[1]):
                os.close(fd)
            self.deadline = time.monotonic() + self.request["wall_seconds"]
            try:
                status, detail = self._converse(judging, answering, confined[0], cases[1], verdicts[0])
            finally:
                for child in [*self.running]:
                    self._reap(child)
        return {"status": status, "detail": detail, "layers": self.layers}

    def _attempt(self, name: str, apply: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(OSError):  # not available here; Sandbox.weakness reports what that leaves open
            apply(*arguments)
            self.layers.append(name)

    def _isolate(self, user: int) -> None:
        """Enter all namespaces that are available, and shrink the file system."""
        if os.getuid() != 0:
            self._attempt("user namespace", kernel.unshare, "user")
        for kind in ("net", "ipc", "mount"):
            self._attempt(kind, kernel.unshare, kind)
        if "mount" in self.layers:
            self._attempt("detached", kernel.detach_mounts)
        if "detached" in self.layers:
            if user != os.getuid():
                self._attempt("library", kernel.uncover, cell.LIBRARY, self.folder)
            self._attempt("tmpfs", kernel.mount_memory, self.folder, self.request["disk_bytes"], user)
            self._attempt("no /proc", kernel.mount_memory, "/proc", 0, 0)
            self._attempt("read-only", kernel.make_read_only, self.folder if "tmpfs" in self.layers else None)

    def _converse(self, judging: int, answering: int, confined: int, cases: int, verdicts: int) -> tuple[str, str]:
        """(status, detail), once the judge has reported it, or a process has ended too early."""
        try:
            self.layers += wire.receive(confined)
        except wire.Lost:
            return "killed", "the program could not be confined"
        try:
            wire.send(cases, wire.receive(self.talk))
            self._wait_for(verdicts)
            status, detail = wire.receive(verdicts)
        except wire.Lost:
            return self._end_of(judging, " in the check")
        except _Over as over:
            return over.status, over.detail
        return self._end_of(answering, "") if status == "lost" else (status, detail)

    def _wait_for(self, fd: int) -> None:
        """Wait until there is something to read, or it is closed. Raises _Over."""
        own_file_system = "tmpfs" in self.layers
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise _Over("timeout")
            pause = left if own_file_system else min(left, _FOLDER_CHECK_SECONDS)
            ready = select.select([fd, self.talk], [], [], pause)[0]
            if fd in ready:
                return
            if self.talk in ready:
                raise _Over("killed", "the caller is gone")
            if not own_file_system and _folder_bytes(self.folder) > self.request["disk_bytes"]:
                raise _Over("killed", "wrote too much")

    def _end_of(self, child: int, where: str) -> tuple[str, str]:
        """Wait for a process to end by itself; returns (status, detail). It may have closed its pipes long before."""
        while True:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                status, seconds = self._reap(child)
                return _ending(status, seconds >= self.request["limits"]["RLIMIT_CPU"], where)
            if time.monotonic() > self.deadline:
                return "timeout", ""
            if select.select([self.talk], [], [], _TICK_SECONDS)[0]:
                return "killed", "the caller is gone"

    def _reap(self, child: int) -> tuple[int, float]:
        """Kill a child and what it started. Returns its wait status and processor seconds."""
        self.running.remove(child)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)  # the first process of a pid namespace takes all others with it
        _, status, used = os.wait4(child, 0)
        return status, used.ru_utime + used.ru_stime


class _Over(Exception):
    def __init__(self, status: str, detail: str = "") -> None:
        self.status, self.detail = status, detail


def _ending(status: int, spent: bool, where: str) -> tuple[str, str]:
    """(status, detail) of a wait status. spent: it used all of its processor time. A process that ignores the signal
    for this is killed, and so is the first one of a pid namespace."""
    if spent or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout", f"processor time{where}"
    if os.WIFSIGNALED(status):
        return "killed", f"signal {os.WTERMSIG(status)}{where}"
    return "failed", f"left with exit code {os.WEXITSTATUS(status)}{where}"


def _folder_bytes(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
