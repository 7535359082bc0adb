"""What the handlers of the page do to a conversation, without a browser."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from echo_model import ByteTokenizer, EchoModel

from pipeline.ui.chat import ChatSession, End
from pipeline.ui.models import ModelChoice, Sessions

TAB = SimpleNamespace(session_hash="tab")
GIVEN = ("aaaa", "", 0.6, 50, 1.0, 64, "")


class Shy(EchoModel):
    """Says nothing at all when asked to be quiet."""

    def __call__(self, prompt, settings, should_stop):
        if ByteTokenizer().decode(prompt).endswith("quiet"):
            return iter([End("end", 1, 0.0)])
        return super().__call__(prompt, settings, should_stop)


@pytest.fixture
def page():
    from pipeline.ui.page import Page  # not above: gradio takes seconds to import, in every process that collects tests

    models = [ModelChoice("rl", "aaaa", Path("a"), Path("t"))]
    return Page(Sessions(models, load=lambda *_: ChatSession(Shy(), ByteTokenizer(), 400)))


def roles(conversation):
    return [message["role"] for message in conversation]


def test_a_conversation_goes_on_after_an_empty_answer(page):
    *_, (conversation, *_) = page.send(TAB, "quiet", [], *GIVEN)
    *_, (conversation, *_) = page.send(TAB, "hello", conversation, *GIVEN)
    assert roles(conversation) == ["user", "assistant"] * 2


def test_a_message_that_is_too_long_goes_back_into_the_box(page):
    with pytest.warns(UserWarning, match="Shorten it"):
        *_, (conversation, shown, box, _) = page.send(TAB, "x" * 500, [], *GIVEN)
    assert conversation == [] and shown == [] and box["value"] == "x" * 500


def test_an_empty_field_of_the_settings_is_named(page):
    given = ("aaaa", "", None, 50, 1.0, 64, "")
    with pytest.warns(UserWarning, match="a number is missing"):
        *_, (conversation, _, box, _) = page.send(TAB, "hello", [], *given)
    assert conversation == [] and box["value"] == "hello"


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "leave",
    [lambda page, said: page.clear(TAB), lambda page, said: page.undo(TAB, SimpleNamespace(index=0), said)],
    ids=["new chat", "undo"],
)
def test_an_answer_that_is_being_written_does_not_come_back(page, leave, at_once):
    answer = page.send(TAB, "forever", [], *GIVEN)
    for _ in range(4):
        said, *_ = next(answer)
    assert leave(page, said)[:2] == ([], [])
    if not at_once:
        assert list(answer) == []
    steps = page.send(TAB, "hello", [], *GIVEN)
    next(steps)
    if at_once:
        assert list(answer) == []
    *_, (conversation, *_) = steps
    assert roles(conversation) == ["user", "assistant"] and conversation[0]["content"] == "hello"
