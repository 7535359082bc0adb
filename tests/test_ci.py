"""`.ci/run`, with stand-ins for what it calls: each of them notes its line and ends as the test wants."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ["ruff check .", "ruff format --check .", "mypy", "pytest -m not full or service"]
NOTE = 'echo "$(basename "$0") $*" | sed "s/ *$//" >> "$CALLS"\n'


class Checkout:
    """A folder with .ci/run, and a PATH on which only stand-ins and the basic commands are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        (folder / ".ci").mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
        for name in ("bash", "dirname", "basename", "rm", "mkdir", "id", "timeout", "env", "sed", "touch"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        fails = 'case "$(basename "$0") $*" in "$FAILS"*) exit 1;; esac'
        for name in ("pip", "ruff", "mypy"):
            self.stand_in(name, fails)
        self.stand_in("pytest", 'echo "7 passed in 1s"\n' + fails)
        self.stand_in("sudo", 'shift; "$@"')
        self.stand_in("python", 'mkdir -p "$3/bin"; touch "$3/bin/activate"')

    def stand_in(self, name: str, then: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{NOTE}{then}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str, fails: str = "nothing", **env: str) -> subprocess.CompletedProcess[str]:
        own = {"PATH": str(self.bin), "CALLS": str(self.calls), "FAILS": fails, "PYTHON": "python"}
        command = [str(self.bin / "bash"), ".ci/run", *arguments]
        return subprocess.run(command, cwd=self.folder, env=own | env, capture_output=True, text=True, timeout=60)

    def called(self, *programs: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.split()[0] in programs]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_style_types_and_tests_are_checked(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert checkout.called("ruff", "mypy", "pytest") == CHECKS


@pytest.mark.parametrize("broken", ["ruff check", "ruff format", "mypy", "pytest"])
def test_one_failed_check_fails_the_run_and_the_others_still_run(checkout: Checkout, broken: str) -> None:
    done = checkout.run(fails=broken)
    assert done.returncode == 1
    assert checkout.called("ruff", "mypy", "pytest") == CHECKS
    last = done.stdout.splitlines()[-2:]
    assert last[0] == "7 passed in 1s" and last[1].startswith(f"failed: {broken}")


def test_a_failed_installation_ends_the_run(checkout: Checkout) -> None:
    assert checkout.run(fails="pip install").returncode == 1
    assert checkout.called("pytest") == []


@pytest.mark.parametrize("asked", [[], ["--services"]])
@pytest.mark.parametrize("env", [{}, {"CI": "true"}])
def test_packages_are_installed_only_in_ci_or_where_asked(checkout: Checkout, asked: list[str], env) -> None:
    checkout.stand_in("apt-get", "exit 0")
    assert checkout.run(*asked, **env).returncode == 0
    wanted = ["apt-get update -qq", "apt-get install -qq --no-install-recommends chromium"]
    assert checkout.called("apt-get") == (wanted if asked or env else [])


def test_a_browser_that_is_there_is_not_installed_again(checkout: Checkout) -> None:
    checkout.stand_in("apt-get", "exit 0")
    checkout.stand_in("google-chrome", "exit 0")
    assert checkout.run(CI="true").returncode == 0
    assert checkout.called("apt-get") == []


@pytest.mark.parametrize("how", ["offline", "missing"])
def test_packages_that_cannot_be_installed_do_not_fail_the_run(checkout: Checkout, how: str) -> None:
    if how == "offline":
        checkout.stand_in("apt-get", "exit 100")
    done = checkout.run(CI="true")
    assert done.returncode == 0, done.stderr
    assert "could not install chromium; tests that need it are skipped" in done.stdout
    assert checkout.called("ruff", "mypy", "pytest") == CHECKS


def test_a_test_of_a_service_says_that_it_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from tests.services import service\npytestmark = service('a Slurm', None)\ndef test_it(): assert False\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-m",
        "not full or service",
        "-c",
        "pyproject.toml",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "needs a Slurm" in done.stdout and "1 skipped" in done.stdout
