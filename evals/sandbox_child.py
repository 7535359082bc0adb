"""The sandbox's own process: isolates itself, forks, runs the program in the child and watches over it.

Started by evals/sandbox.py as `python -I -S sandbox_child.py RESULT_FD` with one JSON line on standard input and the
program's output going to standard output. Standard input stays open while the parent lives: when it closes, whatever
runs here ends. Only the standard library is at hand.
"""

import contextlib
import importlib
import json
import os
import pwd
import resource
import select
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import sandbox_kernel as kernel

sys.path.pop(0)

# Imported before privileges go: an interpreter below /root cannot be read by the user that the program runs as.
_PROGRAMS_USE = (
    "typing math cmath re string random itertools functools collections heapq bisect operator statistics copy datetime "
    "decimal fractions hashlib json calendar textwrap abc dataclasses enum io contextlib array struct traceback socket "
    "time threading"
)
_TICK_SECONDS = 0.01
_FOLDER_CHECK_SECONDS = 0.1


def isolate(folder: str, disk_bytes: int, user: int) -> list[str]:
    """Enter what namespaces there are and shrink the file system; returns the layers that took hold."""
    layers: list[str] = []

    def attempt(name: str, apply, *arguments: object) -> None:
        try:
            apply(*arguments)
            layers.append(name)
        except OSError:
            pass  # a layer this machine has not; the parent judges by what is left

    if os.getuid() != 0:
        attempt("user namespace", kernel.unshare, "user")
    for kind in ("net", "pid", "ipc", "mount"):
        attempt(kind, kernel.unshare, kind)
    if "mount" in layers:
        attempt("detached", kernel.detach_mounts)
    if "detached" in layers:
        attempt("tmpfs", kernel.mount_memory, folder, disk_bytes, user)
        attempt("no /proc", kernel.mount_memory, "/proc", 0, 0)
        attempt("read-only", kernel.make_read_only, folder if "tmpfs" in layers else None)
    return layers


def unused_user() -> int:
    """A user id that no account and no process has (root only; others keep their own)."""
    if os.getuid() != 0:
        return os.getuid()
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                taken.add(os.stat(f"/proc/{name}").st_uid)
    candidate = 20_000 + os.getpid() % 40_000
    while candidate in taken:
        candidate += 1
    return candidate


def confine(folder: str, limits: dict[str, int], user: int) -> list[str]:
    """In the child, for good: own session, limits, another user, no capabilities, no calls out. Returns the layers."""
    os.setsid()
    os.chdir(folder)
    layers = []
    for name in ("landlock", "user", "seccomp"):
        try:
            if name == "landlock":
                kernel.landlock(folder)
            elif name == "user" and os.getuid() == 0:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            if name == "user":
                _limit(limits)
                kernel.drop_capabilities()
            elif name == "seccomp":
                kernel.deny_calls()
            layers.append(name)
        except OSError:
            pass  # as in isolate
    return layers


def enter_cgroup(fd: int | None) -> list[str]:
    """In the child. Returns the layer, if there is one."""
    if fd is None:
        return []
    try:
        procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
        os.write(procs, b"0")
        os.close(procs)
        return ["cgroup"]
    except OSError:
        return []  # as in isolate
    finally:
        os.close(fd)


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value + 1 if name == "RLIMIT_CPU" else value))


def run_program(request: dict, result_fd: int) -> None:
    """Run the program text as __main__ and report how it ended. Does not return."""
    secret, text = request.pop("secret"), request.pop("program")
    status, detail = "failed", ""
    try:
        exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})
        status = "passed"
    except MemoryError:
        status = "memory"
    except SystemExit as error:  # leaving early is not the same as reaching the end
        detail = f"exit {error.code}"
    except BaseException as error:
        detail = f"{type(error).__name__}: {error}"[:500]
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os.write(result_fd, json.dumps({"secret": secret, "status": status, "detail": detail}).encode() + b"\n")
    os._exit(0)


def watch(child: int, request: dict, layers: list[str]) -> dict[str, str]:
    """Wait for the child's end, its deadline, or the parent's; returns what to report when the child cannot."""
    deadline = time.monotonic() + request["wall_seconds"]
    check_folder = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _ending(status)
        now = time.monotonic()
        orphaned = select.select([0], [], [], _TICK_SECONDS)[0] and not os.read(0, 1)
        too_big = False
        if "tmpfs" not in layers and now > check_folder:
            check_folder = now + _FOLDER_CHECK_SECONDS
            too_big = _folder_bytes(request["folder"]) > request["disk_bytes"]
        if orphaned or too_big or now > deadline:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)  # the first process of a pid namespace takes all others with it
            os.waitpid(child, 0)
            return {"status": "killed", "detail": "wrote too much"} if too_big else {"status": "timeout", "detail": ""}


def _ending(status: int) -> dict[str, str]:
    if not os.WIFSIGNALED(status):
        return {"status": "failed", "detail": f"left with exit code {os.WEXITSTATUS(status)}"}
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return {"status": "timeout", "detail": "processor time"}
    return {"status": "killed", "detail": f"signal {number}"}


def _folder_bytes(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _read_request() -> dict:
    data = b""
    while not data.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit("no request")
        data += piece
    return json.loads(data)


def main() -> None:
    result_fd = int(sys.argv[1])
    request = _read_request()
    for name in _PROGRAMS_USE.split():
        importlib.import_module(name)
    user = unused_user()
    if os.getuid() == 0:
        os.chown(request["folder"], user, user)
    # Opened here, it can be written to and removed from behind a file system that is read-only.
    cgroup = os.open(request["cgroup"], os.O_RDONLY | os.O_DIRECTORY) if request["cgroup"] else None
    beside = os.open(os.path.dirname(request["cgroup"]), os.O_RDONLY | os.O_DIRECTORY) if request["cgroup"] else None
    layers = isolate(request["folder"], request["disk_bytes"], user)
    child = os.fork()
    if child == 0:
        if beside is not None:
            os.close(beside)
        layers += enter_cgroup(cgroup) + confine(request["folder"], request["limits"], user)
        os.write(result_fd, json.dumps({"layers": layers}).encode() + b"\n")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run_program(request, result_fd)
    ending = watch(child, request, layers)
    if beside is not None:
        with contextlib.suppress(OSError):
            os.rmdir(os.path.basename(request["cgroup"]), dir_fd=beside)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads on when a program floods this pipe: end quietly
    os.write(result_fd, json.dumps({"secret": request["secret"], **ending}).encode() + b"\n")


if __name__ == "__main__":
    main()
