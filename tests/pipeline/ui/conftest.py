import pytest
from echo_model import ByteTokenizer, EchoModel

from pipeline.ui.chat import ChatSession


@pytest.fixture
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture
def session(model: EchoModel) -> ChatSession:
    return ChatSession(model, ByteTokenizer(), context=400)
