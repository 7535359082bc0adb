from hypothesis import given
from hypothesis import strategies as st

kinds = st.sampled_from(["text", "python", "python_output"])
parts = st.lists(st.builds(lambda kind, text: {"type": kind, "text": text}, kinds, st.text()))
answers = st.builds(lambda content: {"role": "assistant", "content": content}, st.text() | parts)
questions = st.builds(lambda text: {"role": "user", "content": text}, st.text())
conversations = st.lists(st.tuples(questions, answers)).map(lambda turns: [m for turn in turns for m in turn])


@given(conversations)
def test_every_message_is_shown_and_every_shown_entry_knows_its_message(conversation):
    from pipeline.ui.page import position, shown  # not above: gradio takes seconds to import

    entries = shown(conversation)
    owners = [position(conversation, i) for i in range(len(entries))]

    assert sorted(set(owners)) == list(range(len(conversation)))
    assert owners == sorted(owners)
    assert [e["role"] for e in entries] == [conversation[o]["role"] for o in owners]


def test_a_tool_call_unfolds_to_the_call_and_its_result():
    from pipeline.ui.page import shown

    parts = [{"type": "text", "text": "Let me see."}, {"type": "python", "text": "3+4"}]
    call = shown([{"role": "assistant", "content": parts}], pending=True)[1]
    assert call["metadata"] == {"title": "Calculator: `3+4`", "status": "pending"}

    parts.append({"type": "python_output", "text": "7"})
    call = shown([{"role": "assistant", "content": parts}])[1]
    assert call["metadata"] == {"title": "Calculator: `3+4 = 7`", "status": "done"}
    assert "<pre>3+4</pre><pre>7</pre>" in call["content"][0]["text"]


def test_what_a_model_writes_into_a_call_is_not_taken_for_html():
    from pipeline.ui.page import shown

    entry = shown([{"role": "assistant", "content": [{"type": "python", "text": "<img src=x>"}]}])[0]

    assert "<img" not in entry["content"][0]["text"]
