"""Fixtures for tests of runs: Prefect servers."""

import sys
from collections.abc import Iterator

import pytest

from pipeline.runner import launch
from pipeline.runner.server import TemporaryServer
from tests.conftest import Chatmill
from tests.pipeline.prefect_server import PrefectServer


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server for all tests of this process, which ends with it: runs need not start their own."""
    server = TemporaryServer(print, lambda: False)  # to runs, one that the user has configured
    yield server.url
    if "prefect" in sys.modules:  # which would wait for the server when Python ends
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        EventsWorker.drain_all(timeout=10)
        APILogWorker.drain_all(timeout=10)
    server.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server as a user starts it, with all services, for tests of this process that leave it alone."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of one process that commands in this process start do without torchrun, which takes seconds to start."""
    command = launch.command
    monkeypatch.setattr(launch, "command", lambda job, ranks, nproc: command(job, ranks and nproc > 1, nproc))


@pytest.fixture
def served(chatmill: Chatmill, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Chatmill:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    return chatmill
