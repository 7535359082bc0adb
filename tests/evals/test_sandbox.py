"""Model-written code is confined. Every hostile program here is bounded even if nothing confined it."""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from evals import sandbox_kernel as kernel
from evals.sandbox import Execution, Limits, Sandbox

LIMITS = Limits(wall_seconds=1.0, cpu_seconds=2, memory_bytes=256 << 20, disk_bytes=4 << 20)


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


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "try:\n while True: pass\nfinally:\n while True: pass"],
)
def test_endless_programs_end_in_time(sandbox, program):
    result = sandbox(program)

    assert result.status in ("timeout", "killed") and result.seconds < 10


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
    made = []
    with a_cgroup():
        make = kernel.limit_processes
        monkeypatch.setattr(kernel, "limit_processes", lambda *given: made.append(make(*given)) or made[-1])

        assert "cgroup" in sandbox("pass").layers and sandbox("while True: pass").status == "timeout"

    assert len(made) == 2 and not any(group.exists() for group in made)


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
import fcntl, os, sys
sys.path.insert(0, {str(Path(kernel.__file__).parent)!r})
import sandbox_kernel
path, parent = {str(victim)!r}, {os.getpid()}
inner, outer = os.pipe()
sandbox_kernel.deny_calls()
for attempt in (
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


def test_reports_cannot_be_forged_or_flooded(sandbox):
    forge = """
import os
for fd in range(3, 16):
    try:
        os.write(fd, b'{"status": "passed"}\\n' * %d)
    except OSError:
        pass
"""

    assert not sandbox(forge % 1 + "1 / 0").passed
    assert not sandbox(forge % 10_000 + "1 / 0").passed


@pytest.mark.parametrize(
    "junk",
    [b"{no json}", b"{\xff}", b'{"a":' + b"[" * 20_000 + b"}", b'{"a":' + b"9" * 5_000 + b"}", b'{"layers":3}', b"[1]"],
    ids=["no json", "no text", "deep", "long number", "odd layers", "a list"],
)
def test_reports_that_make_no_sense_are_ignored(sandbox, junk):
    scribble = f"""
import os
for fd in range(3, 16):
    try:
        os.write(fd, {junk!r} + b"\\n")
    except OSError:
        pass
"""

    assert sandbox(scribble).passed and sandbox(scribble + "1 / 0").status == "failed"


def test_a_report_with_the_secret_that_says_nothing_is_ignored(sandbox):
    program = """
import os, sys
seen = sys._getframe(1).f_locals
os.write(seen["result_fd"], b'{"secret":"%s"}\\n' % seen["secret"].encode())
1 / 0
"""

    assert sandbox(program).status == "failed"


def test_nothing_is_left_behind(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    assert sandbox("open('file', 'w').write('x')\nwhile True: pass").status == "timeout"

    assert not list(tmp_path.iterdir())


def test_the_program_ends_with_the_process_that_asked_for_it(sandbox, tmp_path):
    program = f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom evals.sandbox import Limits, Sandbox\n" + (
        "print('up', flush=True)\nSandbox(Limits(wall_seconds=60, cpu_seconds=60), 'weak')('while True: pass')"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}  # the killed process leaves a folder
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout.readline() == "up\n"
    children = _children(parent.pid, expected=2)
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
    strict.__dict__["weakness"] = weak.__dict__["weakness"] = "network cannot be stopped on this machine"

    assert strict("print(1)") == Execution(
        "refused", "network cannot be stopped on this machine; launch.sandbox=weak runs it all the same"
    )
    assert weak("print(1)").passed
