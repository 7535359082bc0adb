"""Fixtures for all tests: a store of their own, the command line, the public sample data where it is available.

Tests run in several processes side by side, each file in one of them. They share no folder, port or thread.
"""

import contextlib
import copy
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

from pipeline.commands import cli
from pipeline.config import compose

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("test_train_resume.py", "test_run.py", "test_plan.py", "test_bench.py", "test_environment.py")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # for small tensors; a second thread would fight with other tests
    settings.register_profile("default", deadline=None, max_examples=25)  # no test depends on how busy the machine is
    settings.register_profile("full", deadline=None, max_examples=100)
    settings.load_profile("default" if "not full" in config.option.markexpr else "full")


def tries(number: int) -> int:
    """Examples of a property that needs more than others: `number` where `full` is asked for, else a quarter of it."""
    return max(1, number * settings().max_examples // 100)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two to four processes; none besides this one for a single file, whose tests run in one process anyway."""
    chosen = {argument.partition("::")[0] for argument in config.args}
    if len(chosen) == 1 and Path(*chosen).is_file():
        return 0
    return max(2, min(4, os.cpu_count() or 2))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one at the end."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="session", autouse=True)
def own_prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}):
        yield


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Keep what Hydra composes from the same overrides: each time takes it a third of a second, and tests ask often."""
    compose_yaml, kept = compose.composed_yaml, {}

    def composed_yaml(overrides: list[str]) -> dict[str, Any]:
        asked = (compose.CONF, os.getcwd(), *overrides)
        if asked not in kept:
            kept[asked] = compose_yaml(overrides)
        return copy.deepcopy(kept[asked])

    with mock.patch.object(compose, "composed_yaml", composed_yaml):
        yield


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undo what Hydra does in a sweep: logs of the whole process, at all levels, would go to a stream of one test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def shared_hub() -> Path:
    """Real public data in the hub's layout, beside the checkout; the test is skipped without it."""
    folder = ROOT.parent / "shared" / "hub"
    if not folder.is_dir():
        pytest.skip("needs the sample data in ../shared/hub")
    return folder


class Chatmill:
    """The command line on one store: in this process where nothing else is said, or in processes of their own."""

    def __init__(self, store: Path):
        self.store = store

    def start(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "flows.py", *arguments],
            cwd=ROOT,
            env=os.environ | self._env(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, **env: str) -> str:
        """The command's output; the test fails when its exit code is not `code`."""
        out = io.StringIO()
        with (
            mock.patch.dict(os.environ, self._env(env)),
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            found = cli.main(list(arguments))
        return _checked(out.getvalue(), found, code)

    def run_process(self, *arguments: str, code: int = 0, **env: str) -> str:
        """The same in a process of its own: for variables that are read once in a process, and for changed modules."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=600)
        return _checked(out + err, process.returncode, code)

    def _env(self, env: dict[str, str]) -> dict[str, str]:
        return {"CHATMILL_STORE": str(self.store), "COLUMNS": "200"} | env


def _checked(said: str, found: int, code: int) -> str:
    assert found == code, f"exit code {found}\n{said}"
    assert "Traceback" not in said, said
    return said


@pytest.fixture
def chatmill(tmp_path: Path) -> Chatmill:
    return Chatmill(tmp_path / "store")
