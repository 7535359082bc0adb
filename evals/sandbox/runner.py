"""One program's run: isolates itself, starts the judge and the answer as confined processes, watches over both.

Its caller holds the other end of `talk`: when that closes, whatever runs here ends. Only the standard library is here.
"""

import contextlib
import itertools
import os
import pwd
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from evals.sandbox import answer, judge, kernel, wire

_FOLDER_CHECK_SECONDS = 0.1
_TICK_SECONDS = 0.01
_SYSTEM_FILES = (
    "/lib /lib64 /usr/lib /usr/lib64 /usr/share/zoneinfo /etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom"
)


def serve(talk: int, output: int) -> None:
    """Run the program that `talk` describes, printing to `output`, and send back how it ended. Does not return.

    First comes {"folder", "limits", "wall_seconds", "disk_bytes"}, then the case that judge.verdict takes: only once
    the process that runs the answer exists, so that no memory of it ever held the check.
    """
    try:
        ending = Run(talk, output, wire.receive(talk)).ending()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a caller that is gone is told nothing
        wire.send(talk, ending)
    finally:
        os._exit(0)


class Run:
    def __init__(self, talk: int, output: int, request: dict[str, Any]) -> None:
        self.talk, self.output, self.request = talk, output, request
        self.folder: str = request["folder"]
        self.layers: list[str] = []
        self.deadline = float("inf")

    def ending(self) -> dict[str, Any]:
        """{"status", "detail", "layers"}"""
        users = unused_users()
        os.chown(self.folder, users[0], -1)
        with _cgroup(os.path.basename(self.folder)) as cgroup:
            self._isolate(users[0])
            cases, questions, replies, verdicts, confined = (os.pipe() for _ in range(5))

            def be_the_judge() -> None:
                confine(None, self.request["limits"], users[1])
                kernel.hide_memory()
                judge.main(cases[0], questions[1], replies[0], verdicts[1])

            def be_the_answer() -> None:
                os.dup2(self.output, 1)
                os.dup2(self.output, 2)
                layers = enter_cgroup(cgroup) + confine(self.folder, self.request["limits"], users[0])
                wire.send(confined[1], layers)
                os.closerange(confined[1], confined[1] + 1)
                answer.main(questions[0], replies[1])

            # The judge comes before the pid namespace, which goes with the answer.
            judging = _start(be_the_judge, cases[0], questions[1], replies[0], verdicts[1])
            self._attempt("pid", kernel.unshare, "pid")
            kept = [] if cgroup is None else [cgroup]
            answering = _start(be_the_answer, self.output, questions[0], replies[1], confined[1], *kept)
            for fd in (cases[0], *questions, *replies, verdicts[1], confined[1]):
                os.close(fd)
            self.deadline = time.monotonic() + self.request["wall_seconds"]
            try:
                status, detail = self._converse(judging, answering, confined[0], cases[1], verdicts[0])
            finally:
                for child in (answering, judging):
                    _kill(child)
        return {"status": status, "detail": detail, "layers": self.layers}

    def _attempt(self, name: str, apply: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(OSError):  # a layer this machine has not; the caller judges by what is left
            apply(*arguments)
            self.layers.append(name)

    def _isolate(self, user: int) -> None:
        """Enter what namespaces there are, and shrink the file system."""
        if os.getuid() != 0:
            self._attempt("user namespace", kernel.unshare, "user")
        for kind in ("net", "ipc", "mount"):
            self._attempt(kind, kernel.unshare, kind)
        if "mount" in self.layers:
            self._attempt("detached", kernel.detach_mounts)
        if "detached" in self.layers:
            self._attempt("tmpfs", kernel.mount_memory, self.folder, self.request["disk_bytes"], user)
            self._attempt("no /proc", kernel.mount_memory, "/proc", 0, 0)
            self._attempt("read-only", kernel.make_read_only, self.folder if "tmpfs" in self.layers else None)

    def _converse(self, judging: int, answering: int, confined: int, cases: int, verdicts: int) -> tuple[str, str]:
        """(status, detail), once the judge has said it, or somebody has ended who should not have."""
        try:
            self.layers += wire.receive(confined)
            wire.send(cases, wire.receive(self.talk))
            self._wait_for(verdicts)
            status, detail = wire.receive(verdicts)
        except wire.Lost:
            return self._end_of(judging, " in the check")
        except _Over as over:
            return over.status, over.detail
        return self._end_of(answering, "") if status == "lost" else (status, detail)

    def _wait_for(self, fd: int) -> None:
        """Until there is something to read, or it is closed. Raises _Over."""
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
                raise _Over("killed", "nobody waits for it")
            if not own_file_system and _folder_bytes(self.folder) > self.request["disk_bytes"]:
                raise _Over("killed", "wrote too much")

    def _end_of(self, child: int, where: str) -> tuple[str, str]:
        """What is said of a process that ended by itself; it may have closed its pipes long before."""
        while True:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                seconds = used.ru_utime + used.ru_stime
                return _ending(status, seconds >= self.request["limits"]["RLIMIT_CPU"], where)
            if time.monotonic() > self.deadline:
                return "timeout", ""
            if select.select([self.talk], [], [], _TICK_SECONDS)[0]:
                return "killed", "nobody waits for it"


class _Over(Exception):
    def __init__(self, status: str, detail: str = "") -> None:
        self.status, self.detail = status, detail


def _ending(status: int, spent: bool, where: str) -> tuple[str, str]:
    """spent: whether it used all of its processor time. A process that ignores the signal for it is killed, and so is
    the first one of a pid namespace."""
    if spent:
        return "timeout", f"processor time{where}"
    if os.WIFSIGNALED(status):
        return "killed", f"signal {os.WTERMSIG(status)}{where}"
    return "failed", f"left with exit code {os.WEXITSTATUS(status)}{where}"


def _start(work: Callable[[], None], *keep: int) -> int:
    """A child that has no files but `keep` and runs `work`; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        ends = sorted({0, 1, 2, *keep})
        for low, high in itertools.pairwise([*ends, os.sysconf("SC_OPEN_MAX")]):
            os.closerange(low + 1, high)
        work()
    finally:
        os._exit(0)


def _kill(child: int) -> None:
    """It may be gone. The first process of a pid namespace takes all others with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def unused_users() -> tuple[int, int]:
    """Two user ids that no account and no process has, for the answer and the judge (only root; others keep theirs)."""
    if os.getuid() != 0:
        return os.getuid(), os.getuid()
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                taken.add(os.stat(f"/proc/{name}").st_uid)
    first = 20_000 + 2 * (os.getpid() % 20_000)
    while {first, first + 1} & taken:
        first += 2
    return first, first + 1


def readable() -> list[str]:
    """What an interpreter reads after it has started: Python's own modules, libraries, devices that hold nothing."""
    own = [*sys.path, os.path.join(sys.base_prefix, sys.platlibdir)]
    return [path for path in own + _SYSTEM_FILES.split() if os.path.exists(path)]


def confine(folder: str | None, limits: dict[str, int], user: int) -> list[str]:
    """For good: own session, limits, another user, no capabilities, no calls out. Returns the layers that took hold.

    folder: the one where files may be written.
    """
    os.setsid()
    os.chdir(folder or "/")
    layers = []
    for name in ("landlock", "user", "seccomp"):
        try:
            if name == "landlock":
                kernel.landlock(readable(), folder)
            elif name == "user":
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setresgid(user, user, user)
                    os.setresuid(user, user, user)
                _limit(limits)
                kernel.drop_capabilities()
            elif name == "seccomp":
                kernel.end_with_parent()
                kernel.deny_calls()
            layers.append(name)
        except OSError:
            pass  # as in Run._attempt
    return layers


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value + 1 if name == "RLIMIT_CPU" else value))


@contextlib.contextmanager
def _cgroup(name: str):
    """An open cgroup in which one process may be; None where the machine gives us none."""
    try:
        made = kernel.limit_processes(name, 1)
    except OSError:
        yield None
        return
    # Opened here, it can be written to and removed from behind a file system that is read-only.
    folder, beside = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (made, made.parent))
    try:
        yield folder
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=beside)


def enter_cgroup(fd: int | None) -> list[str]:
    """Returns the layer, if there is one."""
    if fd is None:
        return []
    try:
        procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
        os.write(procs, b"0")
        os.close(procs)
        return ["cgroup"]
    except OSError:
        return []  # as in Run._attempt
    finally:
        os.close(fd)


def _folder_bytes(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
