from collections.abc import Iterator

import pytest
from echo_model import ByteTokenizer, EchoModel
from serve_app import App, running

from pipeline.ui.chat import ChatSession


@pytest.fixture
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture
def session(model: EchoModel) -> ChatSession:
    return ChatSession(model, ByteTokenizer(), context=400)


@pytest.fixture(scope="session")
def app() -> Iterator[App]:
    with running() as app:
        yield app
