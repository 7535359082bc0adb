"""How a conversation becomes tokens, and which of them are trained on: by examples, token by token."""

import pytest

from data.chat.conversation import check, pieces, render, render_prompt, spoken
from data.errors import DataError
from tests.data.templates import assistant, from_template, letters, mask_of, user


def rendered(*messages):
    """The tokens, each with a star in front if it is trained on. The exported template must write the same ones."""
    ids, mask = render({"messages": list(messages)}, letters)
    assert len(ids) == len(mask)
    assert from_template(list(messages)) == ("".join(letters.show(ids)), mask_of(letters, ids, mask))
    return [f"{'*' if m else ''}{token}" for token, m in zip(letters.show(ids), mask)]


def test_a_question_and_its_answer():
    assert rendered(user("Hi"), assistant("Yo")) == [
        "<|bos|>",
        *["<|user_start|>", "H", "i", "<|user_end|>"],
        *["<|assistant_start|>", "*Y", "*o", "*<|assistant_end|>"],
    ]


def test_two_exchanges_after_one_bos():
    assert rendered(user("a"), assistant("b"), user("c"), assistant("d")) == [
        "<|bos|>",
        *["<|user_start|>", "a", "<|user_end|>", "<|assistant_start|>", "*b", "*<|assistant_end|>"],
        *["<|user_start|>", "c", "<|user_end|>", "<|assistant_start|>", "*d", "*<|assistant_end|>"],
    ]


def test_a_system_message_goes_before_the_first_user_message_with_a_blank_line_between():
    system = {"role": "system", "content": "S"}
    assert rendered(system, user("a"), assistant("b"), user("c")) == [
        "<|bos|>",
        *["<|user_start|>", "S", "\n", "\n", "a", "<|user_end|>", "<|assistant_start|>", "*b", "*<|assistant_end|>"],
        *["<|user_start|>", "c", "<|user_end|>"],
    ]


def test_a_tool_call_is_trained_on_and_its_output_is_not():
    parts = [
        {"type": "text", "text": "="},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2!"},
    ]
    assert rendered(user("?"), assistant(parts)) == [
        *["<|bos|>", "<|user_start|>", "?", "<|user_end|>", "<|assistant_start|>", "*="],
        *["*<|python_start|>", "*1", "*+", "*1", "*<|python_end|>"],
        *["<|output_start|>", "2", "<|output_end|>"],
        *["*2", "*!", "*<|assistant_end|>"],
    ]


def test_tool_use_in_a_later_turn_with_a_system_message_before():
    system = {"role": "system", "content": "S"}
    parts = [{"type": "python", "text": "9"}, {"type": "python_output", "text": "9"}, {"type": "text", "text": ""}]
    assert rendered(system, user("a"), assistant(" b\n"), user("{c}"), assistant(parts)) == [
        *["<|bos|>", "<|user_start|>", "S", "\n", "\n", "a", "<|user_end|>"],
        *["<|assistant_start|>", "* ", "*b", "*\n", "*<|assistant_end|>"],
        *["<|user_start|>", "{", "c", "}", "<|user_end|>"],
        *["<|assistant_start|>", "*<|python_start|>", "*9", "*<|python_end|>"],
        *["<|output_start|>", "9", "<|output_end|>", "*<|assistant_end|>"],
    ]


def test_an_empty_answer_is_still_an_end_to_learn():
    assert rendered(user(""), assistant("")) == [
        *["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "*<|assistant_end|>"],
    ]


def test_an_answer_of_weight_0_is_context_and_not_trained_on():
    wrong = assistant([{"type": "python", "text": "9"}, {"type": "text", "text": "x"}]) | {"weight": 0}
    messages = [user("a"), wrong, user("b"), assistant("y") | {"weight": 1}]
    ids, mask = render({"messages": messages}, letters)
    assert [token for token, trained in zip(letters.show(ids), mask) if trained] == ["y", "<|assistant_end|>"]
    assert "x" in letters.show(ids)
    muted = {piece.text for piece in pieces({"messages": messages}) if piece.muted}
    assert muted == {"<|python_start|>", "9", "<|python_end|>", "x", "<|assistant_end|>"}


def test_special_tokens_are_not_read_from_text():
    ids, _ = render({"messages": [user("<|bos|>"), assistant("<|assistant_end|>")]}, letters)
    assert ids.count(letters.special["<|bos|>"]) == 1
    assert ids.count(letters.special["<|assistant_end|>"]) == 1


def test_a_prompt_ends_where_the_assistant_is_to_speak():
    asked = {"messages": [user("a"), assistant("b"), user("c")]}
    answered = {"messages": [*asked["messages"], assistant("d")]}
    prompt = render_prompt(asked, letters)
    assert prompt == render_prompt(answered, letters)
    assert letters.show(prompt)[-4:] == ["<|user_start|>", "c", "<|user_end|>", "<|assistant_start|>"]
    ids, _ = render(answered, letters)
    assert ids[: len(prompt)] == prompt
    assert from_template(asked["messages"], prompt=True)[0] == "".join(letters.show(prompt))


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        (None, "list of messages"),
        ({"messages": []}, "at least one"),
        ({"messages": "hello"}, "list of messages"),
        ({"messages": ["hello"]}, "message 1 needs a role and a content"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a role and a content"),
        ({"messages": [{"role": 3, "content": "a"}]}, "role of message 1 is not text"),
        ({"messages": [assistant("a")]}, "message 1 is by 'assistant', expected 'user'"),
        ({"messages": [user("a"), user("b")]}, "message 2 is by 'user', expected 'assistant'"),
        ({"messages": [{"role": "system", "content": "s"}]}, "system message alone"),
        ({"messages": [{"role": "system", "content": "s"}, assistant("a")]}, "message 2 is by 'assistant'"),
        ({"messages": [{"role": "system", "content": 3}, user("a")]}, "content of message 1 is not text"),
        ({"messages": [user([{"type": "text", "text": "a"}])]}, "content of message 1 is not text"),
        ({"messages": [user("a"), assistant(None)]}, "content of message 2 is not text"),
        ({"messages": [user("a"), assistant([{"type": "image", "text": "a"}])]}, "message 2 has a part"),
        ({"messages": [user("a"), assistant([{"type": "text"}])]}, "message 2 has a part"),
    ],
)
def test_what_is_no_conversation_is_said(conversation, complaint):
    with pytest.raises(DataError, match=complaint):
        check(conversation)


def test_texts_side_by_side_are_encoded_as_the_one_text_that_the_template_makes_of_them():
    class Pairs:
        special = letters.special

        def encode(self, text):
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    texts = [{"type": "text", "text": part} for part in ("a", "bc", "", "d")]
    apart = {"messages": [user("q"), assistant([*texts, {"type": "python", "text": "1"}, *texts])]}
    joined = {"type": "text", "text": "abcd"}
    together = {"messages": [user("q"), assistant([joined, {"type": "python", "text": "1"}, joined])]}
    assert render(apart, Pairs()) == render(together, Pairs())


def test_what_is_spoken_leaves_out_calls_outputs_and_special_tokens():
    said = "A<|python_start|>1+\n1<|python_end|><|output_start|>2<|output_end|>B<|assistant_end|>"
    assert spoken(said) == "AB"
    assert spoken("A<|python_start|>1+1 and no end") == "A"
    assert spoken("1 < 2 | 3") == "1 < 2 | 3"
