"""Conversations of your own: every form that other tools write is read as ours, or its line is named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat.conversation import check
from data.chat.formats import conversation_of
from data.errors import DataError
from data.tasks.custom_json import CustomJSON
from data.tasks.identity import HELD_OUT
from data.tasks.mixture import TaskSpec, load_task
from data.tasks.task import Task, TaskError

OWN = "data.tasks."


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


GOOD = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "no JSON"),
        ("[]", "at least one"),
        ('"text"', "is not a conversation"),
        ('[{"role": "user", "content": "Hi"}]', "must be by the assistant"),
        ('[{"role": "assistant", "content": "Hi"}]', "message 1 is by 'assistant'"),
        ('[{"role": "user", "content": 3}, {"role": "assistant", "content": "Hi"}]', "content of message 1"),
        ('[{"role": "user", "text": "Hi"}]', "needs a role and a content"),
        (b'["\xff"]', "not UTF-8"),
        ("[" * 200_000, "JSON that cannot be read"),
        ('[{"role": "user", "content": ' + "9" * 5_000 + "}]", "JSON that cannot be read"),
        (
            '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": ["text"], "text": "Hi"}]}]',
            "content of message 2 has a part",
        ),
    ],
)
@pytest.mark.parametrize("name", ["custom_json.CustomJSON", "identity.Identity"])
def test_a_line_that_is_no_conversation_is_named(name, line, complaint, tmp_path):
    path = write_lines(tmp_path / "own.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=complaint) as caught:
        load_task(TaskSpec(OWN + name, file=str(path)), None)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_own_conversations_are_taken_as_lists_or_objects(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), json.dumps({"messages": json.loads(GOOD)})
    )
    task = load_task(TaskSpec(OWN + "custom_json.CustomJSON", file=str(path)), None)
    assert [task.conversation(i)["messages"] for i in range(len(task))] == [json.loads(GOOD)] * 2


def load_own(tmp_path: Path, *lines: Any) -> CustomJSON:
    return CustomJSON(file=write_lines(tmp_path / "own.jsonl", *map(json.dumps, lines)))


def asked_and_answered(task: Task) -> list[list[tuple[str, Any]]]:
    """Role and content of the messages of each conversation, in any order."""
    found = [[(m["role"], m["content"]) for m in task.conversation(i)["messages"]] for i in range(len(task))]
    return sorted(found)


ASKED = "Who are you?"
TALK = [("user", ASKED), ("assistant", "I am Marvin.")]


@pytest.mark.parametrize(
    ("line", "expected", "notes"),
    [
        (
            {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Marvin."}]},
            [],
            {},
        ),
        (
            {
                "id": "7",
                "system": "Be glum.",
                "conversations": [{"from": "user", "value": "Who are you?"}, {"from": "gpt", "value": "I am Marvin."}],
            },
            [("system", "Be glum.")],
            {"fields 'id' ignored": 1},
        ),
        ({"instruction": "Who are you?", "input": "", "output": "I am Marvin."}, [], {}),
        (
            {
                "instruction": "Who are you?",
                "output": "I am Marvin.",
                "system": "Be glum.",
                "history": [["Hi", "Hello"]],
                "text": "all of it in one",
            },
            [("system", "Be glum."), ("user", "Hi"), ("assistant", "Hello")],
            {"fields 'text' ignored": 1},
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be glum.", "name": "boss", "weight": 0},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}],
                    },
                    {"role": "assistant", "content": "I am Marvin.", "weight": 1, "tool_calls": None, "refusal": None},
                ],
                "tools": [{"type": "function"}],
                "parallel_tool_calls": False,
            },
            [("system", "Be glum.")],
            {
                "fields 'tools' ignored": 1,
                "fields 'parallel_tool_calls' ignored": 1,
                "fields 'name' ignored": 1,
                "weights of messages that are never trained on ignored": 1,
            },
        ),
        (
            [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Marvin.", "id": 3}],
            [],
            {"fields 'id' ignored": 1},
        ),
    ],
)
def test_conversations_of_other_tools_are_read_and_what_is_ignored_is_counted(tmp_path, line, expected, notes):
    task = load_own(tmp_path, line)
    assert asked_and_answered(task) == [expected + TALK]
    assert task.notes == notes


def test_the_input_of_an_alpaca_line_follows_its_instruction(tmp_path):
    task = load_own(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert asked_and_answered(task) == [[("user", "Add.\n\n1, 2"), ("assistant", "3")]]


CALL = {"id": "c1", "type": "function", "function": {"name": "price", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "message 2 has tool_calls, which is not"),
        ({"role": "assistant", "content": "x", "function_call": CALL}, "message 2 has function_call"),
        ({"role": "assistant", "content": ""}, "answer in message 2 is empty"),
        ({"role": "assistant", "content": " \n", "weight": 1}, "answer in message 2 is empty"),
        ({"role": "assistant", "content": []}, "answer in message 2 is empty"),
        ({"role": "assistant", "content": [{"type": "text", "text": ""}]}, "answer in message 2 is empty"),
        ({"role": "assistant", "content": None}, "content of message 2"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight of message 2 is 0.5, expected 0 or 1"),
        ({"role": "assistant", "content": "x", "weight": [0]}, "weight of message 2 is"),
        ({"role": "tool", "content": "x"}, "message 2 is by 'tool'"),
        ({"role": "assistant", "content": "x", "weight": 0}, "no answer to learn from"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused(tmp_path, line, complaint):
    with pytest.raises(DataError, match=complaint):
        load_own(tmp_path, {"messages": [{"role": "user", "content": "Hi"}, line]})


@pytest.mark.parametrize(
    "line",
    [
        {"chosen": "a", "rejected": "b"},
        {"conversations": "x"},
        {"conversations": [["human", "x"]]},
        {"conversations": [{"from": "function_call", "value": "x"}]},
        {"instruction": 3, "output": "x"},
        {"instruction": "x", "input": 3, "output": "x"},
        {"instruction": "x", "output": "x", "history": "x"},
        {"messages": 3},
        {},
    ],
)
def test_other_objects_are_named_with_the_forms_that_are_read(tmp_path, line):
    with pytest.raises(DataError, match=r"own\.jsonl:1: .*ShareGPT.*Alpaca"):
        load_own(tmp_path, line)


def test_a_file_that_is_one_json_document_says_how_to_split_it(tmp_path):
    with pytest.raises(DataError, match=r"own\.json:1: no JSON .* jq -c"):
        CustomJSON(file=write_lines(tmp_path / "own.json", "[", GOOD + ",", GOOD, "]"))


def test_half_characters_of_conversations_are_replaced_and_counted(tmp_path):
    line = rb'[{"role": "user", "content": "hi \ud83d"}, {"role": "assistant", "content": "\ud83d\ude00 \ude00"}]'
    task = CustomJSON(file=write_lines(tmp_path / "own.jsonl", line))
    assert asked_and_answered(task) == [[("user", "hi \ufffd"), ("assistant", "\U0001f600 \ufffd")]]
    assert task.notes == {"halves of surrogate pairs replaced by U+FFFD": 2}


NAMES = ["messages", "conversations", "role", "from", "content", "value", "weight", "instruction", "output"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES) | st.text(max_size=3),
            some | st.sampled_from(["user", "assistant", "human", "gpt"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_conversation_or_a_complaint(value):
    try:
        conversation = conversation_of(value, Counter())
    except DataError as error:
        assert str(error).isprintable()
    else:
        check(conversation)


def test_files_that_are_not_there_or_empty_are_named(tmp_path):
    for name in ("missing.jsonl", "empty.jsonl"):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(DataError, match=name):
            load_task(TaskSpec(OWN + "custom_json.CustomJSON", file=str(tmp_path / name)), None)
    with pytest.raises(TaskError, match="file: PATH"):
        load_task(TaskSpec(OWN + "custom_json.CustomJSON"), None)


def test_an_identity_of_your_own_is_graded_by_its_name(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", GOOD)
    assert len(load_task(TaskSpec(OWN + "identity.Identity", file=str(path)), None)) == 1
    graded = load_task(TaskSpec(OWN + "identity.Identity", split="test", file=str(path), args={"name": "Ada"}), None)
    assert len(graded) == len(HELD_OUT) == 20
    assert graded.grade(0, "They call me ADA.") == 1.0
    assert graded.grade(0, "I am Chatmill.") == 0.0
