"""Fixtures for tests of runs: one Prefect server."""

import sys
from collections.abc import Iterator

import pytest

from pipeline.runner.server import TemporaryServer
from tests.conftest import Chatmill


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
    server.process.kill()


@pytest.fixture
def served(chatmill: Chatmill, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Chatmill:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    return chatmill
