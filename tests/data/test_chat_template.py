"""The template that exported tokenizers carry: the text and the mask of render, and what other tools' clients send."""

import json

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat.conversation import render, render_prompt
from tests.data.templates import END, START, assistant, from_template, letters, mask_of, tool, user

texts = st.text(st.characters(codec="utf-8", exclude_characters=START + END), max_size=20)
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": texts}))
exchanges = st.lists(st.tuples(texts, texts | parts), min_size=1, max_size=4)


def wrapped(messages):
    """Every plain text as a list of one part, as vLLM hands it on."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


@given(st.none() | texts, exchanges, st.sampled_from([{}, {"weight": 0}, {"weight": 1}]), st.booleans(), st.booleans())
def test_it_writes_and_marks_what_we_render(system, turns, weight, unanswered, trim):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    messages[-1] |= weight
    if unanswered:
        messages = messages[:-1]
        ids = render_prompt({"messages": messages}, letters)
        expected = "".join(letters.show(ids))
        assert from_template(messages, unanswered, trim)[0] == expected
        assert from_template(wrapped(messages), unanswered, trim)[0] == expected
    else:
        ids, mask = render({"messages": messages}, letters)
        expected = "".join(letters.show(ids)), mask_of(letters, ids, mask)
        assert from_template(messages, unanswered, trim) == expected
        assert from_template(wrapped(messages), unanswered, trim) == expected


def calculating(expression, name="python", wrap=True):
    function = {"name": name, "arguments": {"expression": expression}}
    return {"tool_calls": [{"id": "1", "type": "function", "function": function} if wrap else function]}


PARTS = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "1 + 1"},
    {"type": "python_output", "text": "2"},
    {"type": "text", "text": "It is 2."},
]


@pytest.mark.parametrize("name", ["python", "calculator"])
@pytest.mark.parametrize("wrap", [True, False])
def test_a_tool_call_and_its_result_are_parts_of_one_turn_and_only_the_call_is_marked(name, wrap):
    asked = [user("?"), assistant("Let me see: ", **calculating("1 + 1", name, wrap)), tool("2")]
    ids, mask = render({"messages": [user("?"), assistant(PARTS)]}, letters)

    assert from_template([*asked, assistant("It is 2.")]) == ("".join(letters.show(ids)), mask_of(letters, ids, mask))


@pytest.mark.parametrize("content", [None, "", []])
def test_a_call_without_a_text_is_the_call_alone(content):
    messages = [user("?"), assistant(content, **calculating("1")), tool([{"type": "text", "text": "1"}])]

    assert from_template(messages, prompt=True)[0] == (
        "<|bos|><|user_start|>?<|user_end|><|assistant_start|><|python_start|>1<|python_end|>"
        "<|output_start|>1<|output_end|>"  # the turn is still open: no second start
    )


def test_calls_one_after_the_other_stay_in_one_turn():
    messages = [user("?"), assistant("a", **calculating("1")), tool("1"), assistant("b", **calculating("2")), tool("2")]
    calls = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}]
    more = [{"type": "python", "text": "2"}, {"type": "python_output", "text": "2"}]
    said = [{"type": "text", "text": name} for name in "abc"]
    ids, mask = render({"messages": [user("?"), assistant([said[0], *calls, said[1], *more, said[2]])]}, letters)

    assert from_template([*messages, assistant("c")]) == ("".join(letters.show(ids)), mask_of(letters, ids, mask))


def called(arguments, name="python"):
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


@given(
    texts | st.sampled_from(['"strawberry".count("r")', "", '"', "a\nb", '{"expression": "1"}']),
    st.sampled_from([None, 1]),
)
def test_arguments_may_be_the_text_that_clients_of_openai_send(expression, indent):
    arguments = json.dumps({"expression": expression}, ensure_ascii=False, indent=indent)
    messages = [user("?"), assistant("", **called(arguments)), tool("1"), assistant("!")]
    if "\\" in arguments.replace('\\"', ""):
        with pytest.raises(jinja2.TemplateError, match="as an object if the expression has a backslash"):
            from_template(messages)
    else:
        as_object = [user("?"), assistant("", **called({"expression": expression})), tool("1"), assistant("!")]
        assert from_template(messages) == from_template(as_object)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "1",
        '{"expression": 1}',
        '{"expr": "1"}',
        '{"expression": "1", "b": "2"}',
        '{"expression": "1"',
        '["1"]',
        None,
    ],
)
def test_other_arguments_are_refused(arguments):
    with pytest.raises(jinja2.TemplateError, match="message 2 needs the arguments"):
        from_template([user("a"), assistant("", **called(arguments)), tool("1")])


def test_tools_that_the_model_does_not_know_are_refused_and_its_own_is_not_announced():
    calculator, search = ({"type": "function", "function": {"name": name}} for name in ("calculator", "search"))
    for ours in ([calculator], [calculator["function"]], [], None):
        assert from_template([user("a")], tools=ours) == from_template([user("a")])
    for foreign in ([calculator, search], [calculator, search["function"]], [calculator, "search"]):
        with pytest.raises(jinja2.TemplateError, match="Tool 2 is not python, the only tool of this model"):
            from_template([user("a")], tools=foreign)


OTHER = called({"expression": "1"}, name="search")
TWO = {"tool_calls": calculating("1")["tool_calls"] * 2}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([{"role": "system", "content": "s"}], "A system message alone"),
        ([user("a"), user("b")], "Message 2 is by user where assistant is due"),
        ([assistant("a")], "Message 1 is by assistant where user is due"),
        ([{"role": "developer", "content": "a"}, user("b")], "Message 1 is by developer where user is due"),
        ([user("a"), {"role": "system", "content": "s"}], "Message 2 is by system where assistant is due"),
        ([user("a"), tool("b")], "Message 2 is by tool where assistant is due"),
        ([user("a"), assistant("", **calculating("1")), assistant("1")], "Message 3 is by assistant where tool is due"),
        ([user("a"), assistant("", **calculating("1"))], "The last message calls a tool. Add its result"),
        ([user("a"), assistant("", **OTHER), tool("1")], "message 2 is not to python"),
        ([user("a"), assistant("", **TWO), tool("1")], "several tool calls in message 2"),
        ([user("a"), assistant(None)], "The content of message 2 is not text"),
        ([user("a"), {"role": "assistant"}], "The content of message 2 is not text"),
        ([user(None)], "The content of message 1 is not text"),
        ([user(3)], "The content of message 1 is not text"),
        ([user({"text": "a"})], "The content of message 1 is not text"),
        ([user(["a"])], "message 1 has a part that is not"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "message 1 has a part that is not"),
        ([user([{"type": "python", "text": "1"}])], "message 1 has a part that is not"),
        ([user("a"), assistant([{"type": "python"}])], "message 2 has a part that is not"),
    ],
)
def test_what_the_model_never_saw_is_refused_in_words(messages, complaint):
    with pytest.raises(jinja2.TemplateError, match=complaint):
        from_template(messages)
