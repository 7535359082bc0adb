"""Model-written code is confined. Every hostile program here is bounded even if nothing confined it."""

import contextlib
import dataclasses
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data.tasks.task import Check
from evals.sandbox import kernel
from evals.sandbox.box import Execution, Limits, Sandbox

LIMITS = Limits(wall_seconds=60.0, cpu_seconds=1, memory_bytes=256 << 20, disk_bytes=4 << 20)
SHORT = dataclasses.replace(LIMITS, wall_seconds=1.0)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    box = Sandbox(LIMITS)
    if box.weakness:
        pytest.skip(f"no sandbox on this machine: {box.weakness}")
    return box


def test_a_program_that_reaches_its_end_passes_and_its_output_is_kept(sandbox):
    result = sandbox("import math\nassert math.gcd(12, 18) == 6\nprint('fine')")

    assert result.passed and result.output == "fine\n"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "exit 0"),
        ("import os; os._exit(0)", "exit code 0"),
    ],
)
def test_failing_or_leaving_early_is_not_passing(sandbox, program, detail):
    result = sandbox(program)

    assert result.status == "failed" and detail in result.detail


CHECK = Check("def check(candidate):\n    assert candidate(1) == 2\n", "f")


def test_a_check_passes_or_fails_a_function_of_the_program(sandbox):
    right = sandbox("def f(x): return x + 1", CHECK)
    wrong = sandbox("def f(x): return x", CHECK)

    assert right.passed and not right.advisory
    assert wrong.status == "failed" and wrong.detail.startswith("AssertionError")
    assert sandbox("def g(x): return x", CHECK).detail == "NameError: name 'f' is not defined"
    assert sandbox("def f(x): return x + 1\nf('a')", CHECK).detail.startswith("TypeError")


def test_a_verdict_without_a_check_is_advisory(sandbox):
    assert sandbox("assert True").advisory


def test_a_check_that_never_ends_is_a_timeout():
    result = Sandbox(SHORT)("def f(): pass", Check("def check(candidate):\n    while True: pass", "f"))

    assert result.status == "timeout"


def test_a_sandbox_whose_process_was_killed_starts_another(sandbox):
    sandbox._zygote._process.kill()
    sandbox._zygote._process.wait()

    assert sandbox("pass").passed


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "try:\n while True: pass\nfinally:\n while True: pass"],
)
def test_endless_programs_time_out_by_the_clock_and_by_processor_time(sandbox, program):
    assert Sandbox(SHORT)(program).status == "timeout"
    assert "sleep" in program or sandbox(program).detail == "processor time"


def test_memory_is_limited(sandbox):
    assert sandbox("pieces = [bytearray(1 << 24) for _ in range(64)]").status == "memory"


FORKS = """
import os
made = 0
for _ in range(8):
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        os._exit(0)
    made += 1
print("made", made)
"""


def test_no_process_can_be_started(sandbox):
    assert sandbox(FORKS).output == "made 0\n"
    assert not sandbox("import os; os.execv('/bin/true', ['true'])").passed


def test_a_cgroup_alone_stops_forks():
    with a_cgroup() as group:
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        done = subprocess.run([sys.executable, "-c", join + FORKS], capture_output=True, text=True)

    assert done.stdout == "made 0\n", done.stderr


def test_a_program_is_in_a_cgroup_of_its_own_that_goes_with_it(sandbox, monkeypatch):
    ours = f"{os.getpid():08x}"  # other tests have sandboxes of their own
    monkeypatch.setattr("secrets.token_hex", lambda count: ours)
    with a_cgroup() as group:
        assert "cgroup" in sandbox("pass").layers and Sandbox(SHORT)("while True: pass").status == "timeout"

        assert not list(group.parent.glob(f"sandbox-*{ours}"))


@contextlib.contextmanager
def a_cgroup():
    """One of one process; the test is skipped where none can be made."""
    try:
        group = kernel.limit_processes(f"test-{os.getpid()}", 1)
    except OSError:
        pytest.skip("this process may make no cgroup")
    yield group
    group.rmdir()


def test_no_thread_can_be_started(sandbox):
    assert not sandbox("import threading\nthreading.Thread(target=print).start()").passed


def test_no_socket_reaches_this_machine(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = sandbox(f"import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', {port}))")

    assert result.status == "failed"


def test_files_are_written_in_the_own_folder_only(sandbox, tmp_path):
    tmp_path.chmod(0o777)
    outside = tmp_path / "outside"
    assert sandbox("open('inside', 'w').write('x')\nassert open('inside').read() == 'x'").passed

    result = sandbox(f"open({str(outside)!r}, 'w').write('x')")

    assert result.status == "failed" and not outside.exists()


def test_only_files_of_python_and_the_own_folder_are_read(sandbox, tmp_path):
    """Even those that the file system lets everybody read."""
    tmp_path.chmod(0o777)
    (tmp_path / "outside").write_text("x")
    look = """
import os
for path in (%r, "/etc/passwd", "/proc/self/environ", "/proc/1/cmdline"):
    try:
        print(open(path).read())
    except OSError:
        pass
for path in (%r, "/", "/home", "/etc", "/proc"):
    try:
        print(path, os.listdir(path))
    except OSError:
        pass
"""

    result = sandbox(look % (str(tmp_path / "outside"), str(tmp_path)))

    assert "landlock" not in result.layers or (result.passed and result.output == "")


def test_all_of_pythons_library_is_there_even_where_python_is_below_a_closed_folder(sandbox):
    """As for root with Python in /root: the program runs as another user."""
    result = sandbox("import wave, plistlib, encodings.cp1252, unittest.mock")

    assert result.passed or "library" not in result.layers


def test_the_environment_holds_nothing(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    result = sandbox("import os; print(sorted(set(os.environ) - {'LC_CTYPE'}))")

    assert result.output == "[]\n"


def test_the_disk_cannot_be_filled(sandbox):
    program = "for number in range(64):\n    open(f'{number}', 'wb').write(bytes(1 << 20))"

    assert sandbox(program).status in ("failed", "killed")


def test_printing_without_end_is_cut(sandbox):
    result = sandbox("for _ in range(100_000): print('x' * 1000)")

    assert not result.passed and len(result.output) <= LIMITS.output_bytes


def test_the_parent_cannot_be_signalled(sandbox):
    program = f"""
import os
for victim in (os.getppid(), {os.getpid()}):
    try:
        os.kill(victim, 0)
        print("reached", victim)
    except OSError:
        pass
"""

    assert "reached" not in sandbox(program).output


def test_without_namespaces_files_and_processes_of_the_same_user_are_left_as_they_are(tmp_path):
    """As in a container, where there is no other user and no view of its own: the system call filter must do."""
    if (platform.system(), platform.machine()) not in {("Linux", "x86_64"), ("Linux", "aarch64")}:
        pytest.skip("no system call filter for this machine")
    victim = tmp_path / "victim"
    victim.write_text("data")
    before = victim.stat()
    program = f"""
import ctypes, fcntl, os, sys
sys.path.insert(0, {os.getcwd()!r})
from evals.sandbox import kernel
path, parent = {str(victim)!r}, {os.getpid()}
inner, outer = os.pipe()
kernel.deny_calls()
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *given):
    if getattr(libc, name)(*given) < 0:
        raise OSError(ctypes.get_errno(), name)
for attempt in (
    lambda: call("shmctl", 0, 13, ctypes.create_string_buffer(200)),
    lambda: call("msgctl", 0, 11, ctypes.create_string_buffer(200)),
    lambda: call("semctl", 0, 0, 18, ctypes.create_string_buffer(200)),
    lambda: call("inotify_init1", 0),
    lambda: call("klogctl", 3, ctypes.create_string_buffer(100), 100),
    lambda: os.chmod(path, 0),
    lambda: os.utime(path, (0, 0)),
    lambda: os.setxattr(path, "user.a", b"b"),
    lambda: os.truncate(path, 0),
    lambda: os.chown(path, os.getuid(), os.getgid()),
    lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
    lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
    lambda: fcntl.fcntl(inner, fcntl.F_SETOWN, parent),
    lambda: fcntl.fcntl(inner, fcntl.F_SETSIG, 9),
):
    try:
        attempt()
        print("done")
    except PermissionError:
        pass
fcntl.fcntl(inner, fcntl.F_SETFL, os.O_NONBLOCK)
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout == "end\n", done.stderr
    assert victim.stat() == before


def test_nothing_is_left_behind(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    assert Sandbox(SHORT)("open('file', 'w').write('x')\nwhile True: pass").status == "timeout"

    assert not list(tmp_path.iterdir())


def test_the_program_ends_with_the_process_that_asked_for_it(sandbox, tmp_path):
    program = f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom evals.sandbox.box import Limits, Sandbox\n" + (
        "print('up', flush=True)\nSandbox(Limits(wall_seconds=60, cpu_seconds=60), 'weak')('while True: pass')"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}  # the killed process leaves a folder
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout.readline() == "up\n"
    children = _children(parent.pid, expected=4)
    parent.kill()
    parent.wait()

    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int, expected: int) -> list[int]:
    """All descendants of a process, once there are `expected` of them."""
    if platform.system() != "Linux":
        pytest.skip("looks into /proc")
    deadline, found = time.monotonic() + 20, []
    while len(found) < expected and time.monotonic() < deadline:
        found, unseen = [], [pid]
        while unseen:
            parent = unseen.pop()
            listing = Path(f"/proc/{parent}/task/{parent}/children")
            unseen += [int(child) for child in listing.read_text().split()] if listing.exists() else []
            found += [parent] if parent != pid else []
    return found


def test_where_nothing_stops_network_or_forks_strict_refuses_and_says_why_and_weak_runs():
    strict, weak = Sandbox(LIMITS), Sandbox(LIMITS, "weak")
    strict.__dict__["weakness"] = weak.__dict__["weakness"] = "on this machine a program could reach the network"

    assert strict("print(1)") == Execution(
        "refused", "on this machine a program could reach the network. Set launch.sandbox=weak to run programs anyway"
    )
    assert weak("print(1)").passed
