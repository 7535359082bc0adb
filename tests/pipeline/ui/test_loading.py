import pytest

from data.tokens import bpe
from model.config import GPTConfig
from model.gpt import new_model
from pipeline.stages.training import write_model
from pipeline.ui.chat import ChatSession, ChatSettings, Draft, End


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A real model that was never trained, from artifacts on disk."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "tokenizer").mkdir()
    (folder / "model").mkdir()
    tokenizer = bpe.save(bpe.train(["the mill grinds the meal of the miller"] * 20, 275), folder / "tokenizer")
    config = GPTConfig(depth=2, width=32, head_dim=16, sequence_len=128).resolved(tokenizer.vocab_size)
    model = new_model(config, seed=1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    write_model(folder / "model", model)
    return ChatSession.load(folder / "model", folder / "tokenizer", "cpu")


def reply(session, **settings):
    draft = Draft()
    for event in session.reply([{"role": "user", "content": "grind"}], ChatSettings(**settings)):
        draft.add(event)
    return draft


def test_a_model_on_disk_answers_in_pieces(session):
    draft = reply(session, max_tokens=12, seed=3)

    assert session.context == 128
    assert isinstance(draft.end, End) and 0 < draft.end.tokens <= 12
    assert draft.end.tokens_per_second > 0


def test_the_same_seed_gives_the_same_answer_and_another_another(session):
    assert reply(session, seed=3).parts == reply(session, seed=3).parts
    assert reply(session, temperature=1.5, seed=3).parts != reply(session, temperature=1.5, seed=4).parts


def test_temperature_zero_needs_no_seed(session):
    assert reply(session, temperature=0.0).parts == reply(session, temperature=0.0).parts


def test_stopping_ends_the_answer_as_stopped(session):
    events = list(session.reply([{"role": "user", "content": "grind"}], ChatSettings(), should_stop=lambda: True))

    assert events[-1].reason in ("stop", "end") and events[-1].tokens <= 2
