"""A confined process: it has only the files, rights and resources that it needs, and cannot get others."""

import contextlib
import itertools
import os
import pwd
import resource
import sys
from collections.abc import Callable, Iterator

from evals.sandbox import kernel

LIBRARY = os.path.join(sys.base_prefix, sys.platlibdir)  # Python's
_SYSTEM_FILES = (
    "/lib /lib64 /usr/lib /usr/lib64 /usr/share/zoneinfo /etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom"
)


def start(work: Callable[[], None], *keep: int) -> int:
    """Start a child that runs `work` with no open files except `keep`. Returns its pid."""
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


def unused_users() -> tuple[int, int]:
    """Two user ids without an account or a process, for the answer and the judge (as root; otherwise our own)."""
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
    """Paths that a running interpreter reads: Python's own modules, system libraries, devices without contents."""
    return [path for path in [*sys.path, LIBRARY, *_SYSTEM_FILES.split()] if os.path.exists(path)]


def confine(folder: str | None, limits: dict[str, int], user: int) -> list[str]:
    """Confine this process for good: own session, limits, another user, no capabilities, few system calls.

    folder: files may be written there. Returns the layers that took effect.
    """
    os.setsid()
    os.chdir(folder or "/")
    layers = []
    with contextlib.suppress(OSError):  # as below: not available on this machine
        kernel.landlock(readable(), folder)
        layers.append("landlock")
    with contextlib.suppress(OSError):
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        _limit(limits)
        kernel.drop_capabilities()
        layers.append("user")
    with contextlib.suppress(OSError):
        kernel.end_with_parent()
        kernel.deny_calls()
        layers.append("seccomp")
    return layers


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value + 1 if name == "RLIMIT_CPU" else value))


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[int | None]:
    """An open cgroup for one process; None if the machine does not allow one."""
    try:
        made = kernel.limit_processes(name, 1)
    except OSError:
        yield None
        return
    # Opened here, it can be written to and removed once the file system is read-only.
    folder, beside = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (made, made.parent))
    try:
        yield folder
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=beside)


def enter_cgroup(fd: int | None) -> list[str]:
    """Enter an open cgroup. Returns the layer, if it took effect."""
    if fd is None:
        return []
    try:
        procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
        os.write(procs, b"0")
        os.close(procs)
        return ["cgroup"]
    except OSError:
        return []  # not available on this machine
    finally:
        os.close(fd)
