"""A user's own files and processes are safe where that user, not root, runs programs; Landlock alone does it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from attacks import ATTACKS, CHECK, LOOKING, MARK, RIGHT

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534

# Runs in the user's process: for each program on standard input, how it ended and what it printed.
RUN = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from data.tasks.task import Check
from evals.sandbox.box import Limits, Sandbox
box = Sandbox(Limits(wall_seconds=4.0, cpu_seconds=1, memory_bytes=256 << 20), *sys.argv[2:])
given = json.load(sys.stdin)
check = Check(given["check"], "add") if given["check"] else None
with ThreadPoolExecutor(2) as pool:
    print(json.dumps([dataclasses.asdict(made) for made in pool.map(lambda text: box(text, check), given["programs"])]))
"""

# A Python for Sandbox whose kernel lacks what is listed: namespaces, as in most containers; Landlock, if it is old.
LACKING = """#!{python} -IS
import sys
source = sys.argv[-1]
sys.path.insert(0, {root!r})
from evals.sandbox import kernel
del sys.path[0]
def refuse(*given):
    raise OSError
for name in {lacking!r}:
    setattr(kernel, name, refuse)
exec(source)
"""


class User:
    """An account with a secret in its home and in its environment."""

    def __init__(self, folder: Path, user: int | None, python: str, lacking: tuple[str, ...]) -> None:
        self.user, self.python, self.lacking = user, python, lacking
        self.home = folder / "home"
        self.token = self.home / ".cache" / "huggingface" / "token"
        self.token.parent.mkdir(parents=True)
        self.token.write_text("hf_secret")
        self.token.chmod(0o600)
        for part in ("evals/sandbox", "data"):
            shutil.copytree(ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "code" / "evals" / "__init__.py").touch()
        self.code = folder / "code"
        self.sandbox_python = python
        if lacking:
            wrapper = folder / "python"
            wrapper.write_text(LACKING.format(python=python, root=str(self.code), lacking=lacking))
            wrapper.chmod(0o755)
            self.sandbox_python = str(wrapper)
        if user is not None:
            for path in (self.home, *self.home.rglob("*")):
                os.chown(path, user, user)

    def run(self, *programs: str, check: str | None = None, mode: str = "weak") -> list[dict]:
        done = subprocess.run(
            [self.python, "-c", RUN, str(self.code), mode, self.sandbox_python],
            input=json.dumps({"programs": programs, "check": check}),
            capture_output=True,
            text=True,
            cwd=self.home,
            env={"HOME": str(self.home), "HF_TOKEN": "hf_secret", "PATH": os.environ["PATH"]},
            **({} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@contextlib.contextmanager
def an_account(*lacking: str):
    nobody = NOBODY if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        yield User(Path(folder), nobody, _python_for(nobody), lacking)


@pytest.fixture(scope="module", params=[(), ("unshare",)], ids=["namespaces", "landlock alone"])
def user(request):
    with an_account(*request.param) as account:
        if "landlock" not in account.run("pass")[0]["layers"]:
            pytest.skip("this kernel has no Landlock")
        yield account


def _python_for(user: int | None) -> str:
    """An interpreter that the user may start: root's own may be below /root."""
    if user is None:
        return sys.executable
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.executable):
        ask = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(ask, user=user, group=user, env={}, cwd="/", capture_output=True).returncode == 0:
                return python
        except OSError:
            pass  # not for this user
    pytest.skip("no Python that another user may start")


def test_a_secret_of_the_user_is_read_neither_from_files_nor_from_processes(user):
    look = f"""
import glob, os
home = {str(user.home)!r}
names = [os.path.join(home, ".cache", "huggingface", "token"), "/proc/self/environ"]
names += [f"/proc/{{pid}}/{{part}}" for pid in range(1, 70_000, 1) for part in ("environ", "cmdline")][:2000]
names += [f"/proc/{{os.getppid()}}/{{part}}" for part in ("environ", "cmdline", "mem", "maps")]
for name in names:
    try:
        print("read", name, open(name, "rb").read(100))
    except OSError:
        pass
for name in (home, os.path.dirname(home), "/", "/home", "/etc", "/tmp", "/proc"):
    try:
        print("listed", name, os.listdir(name))
    except OSError:
        pass
try:
    os.symlink(names[0], "link")
    print("read", open("link").read())
except OSError:
    pass
try:
    os.link(names[0], "hard")
    print("read", open("hard").read())
except OSError:
    pass
print(sorted(set(os.environ) - {{"LC_CTYPE"}}))
"""
    (looked,) = user.run(look)

    assert looked["status"] == "passed"
    assert not user.lacking or not {"mount", "net", "pid"} & {*looked["layers"]}
    assert looked["output"] == "[]\n"


def test_the_users_files_are_left_as_they_are(user):
    token = str(user.token)
    before = user.token.stat()
    tries = [f"open({token!r}, 'a')", f"import os; os.unlink({token!r})", f"import os; os.rename({token!r}, 'x')"]

    assert all(made["status"] == "failed" for made in user.run(*tries))
    assert user.token.stat() == before


def test_modules_and_libraries_of_python_are_read(user):
    (made,) = user.run("import csv, unittest.mock, encodings.cp1252, ctypes, lzma, tempfile, xml.dom.minidom")

    assert made["status"] == "passed"


def test_strict_runs_nothing_where_neither_landlock_nor_another_user_keeps_files_from_being_read():
    with an_account("unshare", "landlock") as user:
        (strict,), (weak,) = user.run("print(1)", mode="strict"), user.run("print(1)")

    assert (
        strict["status"] == "refused"
        and "a program could" in strict["detail"]
        and "read your files" in strict["detail"]
    )
    assert weak["status"] == "passed"


def test_a_program_that_looks_for_the_check_or_its_judge_does_not_pass(user):
    _none_passes(user, LOOKING)


@pytest.mark.full
def test_no_attack_passes(user):
    _none_passes(user, list(ATTACKS))


def _none_passes(user: User, names: list[str]) -> None:
    right, *made = user.run(RIGHT, *(ATTACKS[name] for name in names), check=CHECK)

    assert right["status"] == "passed"
    for name, result in zip(names, made):
        assert result["status"] != "passed", name
        assert "found" not in result["output"] and MARK not in result["output"], name
