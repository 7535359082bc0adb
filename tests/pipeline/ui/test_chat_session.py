import pytest
from echo_model import ByteTokenizer, EchoModel
from hypothesis import given
from hypothesis import strategies as st

from data.chat.conversation import render_prompt
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


texts = st.text(max_size=60)
talks = st.tuples(st.none() | texts, st.lists(st.tuples(texts, texts), max_size=12), texts)


@given(talk=talks, max_tokens=st.integers(1, 500))
def test_exactly_as_many_turns_are_kept_as_fit(talk, max_tokens):
    system, pairs, last = talk
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [m for text, answer in pairs for m in (user(text), {"role": "assistant", "content": answer})] + [user(last)]
    room = 400 - min(max_tokens, 100)
    prompts = [render_prompt({"messages": head + turns[i:]}, ByteTokenizer()) for i in range(0, len(turns), 2)]
    wanted = next((p for p in prompts if len(p) <= room), prompts[-1])
    model = EchoModel()
    try:
        end = list(
            ChatSession(Silent(model), ByteTokenizer(), 400).reply(head + turns, ChatSettings(max_tokens=max_tokens))
        )[-1]
    except UserError as error:
        assert "Shorten it" in str(error) and len(wanted) >= 400
    else:
        assert model.prompts == [wanted]
        assert end.forgotten == 2 * prompts.index(wanted)


class Silent:
    def __init__(self, model):
        self.model = model

    def __call__(self, prompt, settings, should_stop):
        self.model.prompts.append(prompt)
        yield End("end", 0, 0.0)


def test_a_long_conversation_is_encoded_no_further_than_it_is_read_and_nothing_twice(session, monkeypatch):
    encoded = []
    monkeypatch.setattr(session, "_tokenizer", Counting(encoded))
    talk = [m for i in range(5000) for m in (user(f"question {i}"), {"role": "assistant", "content": f"answer {i}"})]
    list(session.reply([*talk, user("last")][2:]))

    assert len(encoded) == len(set(encoded)) < 60


class Counting(ByteTokenizer):
    def __init__(self, encoded):
        self.encoded = encoded

    def encode(self, text):
        self.encoded.append(text)
        return super().encode(text)


def test_who_waits_for_the_model_and_leaves_is_let_go(session):
    first = session.reply([user("forever")])
    next(first)
    assert [event.reason for event in session.reply([user("hi")], should_stop=lambda: True)] == ["stop"]
    first.close()


def test_the_length_of_an_answer_is_limited_by_what_is_left_of_the_context(session, model):
    list(session.reply([user("x" * 300)], ChatSettings(max_tokens=1000)))

    assert len(model.prompts[0]) + model.settings[0].max_tokens == session.context


def test_a_message_longer_than_the_context_is_the_users_to_shorten(session):
    with pytest.raises(UserError, match=r"take 5.. tokens, but the context has 400. Shorten it"):
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
