import pytest
from echo_model import ByteTokenizer

from pipeline.errors import UserError
from pipeline.ui.chat import ChatSession, ChatSettings, Draft, End, Text, ToolCall, ToolOutput

ANSWERED = [{"role": "assistant", "content": "there was"}]


def user(text):
    return {"role": "user", "content": text}


def test_an_answer_ends_with_one_end_event_that_says_why_and_how_fast(session):
    events = list(session.reply([user("hello")]))

    assert [e for e in events if isinstance(e, End)] == [events[-1]]
    assert events[-1].reason == "end"
    assert events[-1].seconds > 0
    assert "tokens/s" in events[-1].describe()


def test_an_answer_with_a_tool_call_becomes_a_message_that_renders_again(session):
    draft = Draft()
    for event in session.reply([user("3+4")]):
        draft.add(event)

    assert [part["type"] for part in draft.message["content"]] == ["text", "python", "python_output", "text"]
    assert draft.text == "It is 7."
    again = list(session.reply([user("3+4"), draft.message, user("and?")]))
    assert again[-1].reason == "end"


def test_an_answer_without_tools_is_plain_text():
    draft = Draft()
    for event in (Text("a"), Text("b"), End("end", 2, 1.0)):
        draft.add(event)

    assert draft.message == {"role": "assistant", "content": "ab"}
    assert draft.end.tokens_per_second == 2.0


def test_the_oldest_turns_go_first_and_the_system_prompt_stays(session, model):
    talk = [{"role": "system", "content": "Be brief."}]
    for i in range(12):
        talk += [user(f"question {i} " + "x" * 20), {"role": "assistant", "content": f"answer {i}"}]
    events = list(session.reply([*talk, user("last")], ChatSettings(max_tokens=50)))

    read = session._tokenizer.decode(model.prompts[0])
    assert read.startswith("Be brief.") and read.endswith("last")
    assert "question 0 " not in read and "question 11" in read
    assert events[-1].forgotten > 0 and events[-1].forgotten % 2 == 0
    assert f"first {events[-1].forgotten} messages" in events[-1].describe()


def test_the_length_of_an_answer_is_limited_by_what_is_left_of_the_context(session, model):
    list(session.reply([user("x" * 300)], ChatSettings(max_tokens=1000)))

    assert len(model.prompts[0]) + model.settings[0].max_tokens == session.context


def test_a_message_longer_than_the_context_is_the_users_to_shorten(session):
    with pytest.raises(UserError, match=r"the message takes 5.. tokens .* the model reads 400. Shorten it"):
        list(session.reply([user("x" * 500)]))


def test_without_a_seed_every_answer_gets_another_one(session, model):
    for settings in (ChatSettings(), ChatSettings(), ChatSettings(seed=5)):
        list(session.reply([user("hi")], settings))

    first, second, third = (s.seed for s in model.settings)
    assert first != second and third == 5


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_tokens": 0}], ids=lambda w: next(iter(w))
)
def test_settings_that_mean_nothing_are_named(session, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        list(session.reply([user("hi")], ChatSettings(**wrong)))


def test_a_conversation_that_does_not_end_with_a_question_is_refused(session):
    with pytest.raises(UserError, match="no message to answer"):
        list(session.reply([user("hi"), {"role": "assistant", "content": "hello"}]))


def test_a_base_model_continues_the_text_of_the_last_message(model):
    base = ChatSession(model, ByteTokenizer(), context=400, continues=True)
    list(base.reply([{"role": "system", "content": "Be brief."}, user("Once upon"), *ANSWERED, user("a time")]))

    assert model.prompts[0] == [0, *ByteTokenizer().encode("a time")]


def test_should_stop_ends_an_answer_and_a_closed_one_leaves_the_session_free(session):
    seen = []
    for event in session.reply([user("forever")], should_stop=lambda: len(seen) > 5):
        seen.append(event)
    assert seen[-1].reason == "stop"

    unfinished = session.reply([user("forever")])
    next(unfinished)
    unfinished.close()
    assert list(session.reply([user("3+4")]))[1:3] == [ToolCall("3+4"), ToolOutput("7")]
