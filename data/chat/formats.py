"""Conversion of conversations in the formats of other tools: OpenAI's fine-tuning lines, ShareGPT and Alpaca.

Fields that change the meaning are used or refused; others are ignored and counted.
"""

from collections import Counter
from typing import Any

from data.chat.conversation import Conversation, check, is_empty_answer
from data.errors import DataMistake
from data.trust import shown

KNOWN = (
    'a list of {"role", "content"}, {"messages": such a list}, ShareGPT\'s {"conversations": [{"from", "value"}]}, '
    'or Alpaca\'s {"instruction", "input", "output"}'
)
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
CALLS = ("tool_calls", "function_call")
MOST_NOTES = 20  # fields that are counted by name


class Unlearnable(DataMistake):
    """A conversation whose answers cannot be learnt as they are."""


def conversation_of(value: Any, notes: Counter[str]) -> Conversation:
    """The conversation that a JSON value represents, checked for training. notes: counts fields that are ignored.

    Raises DataError for any other value, for answers that call tools or are empty, and if the last message is not one.
    """
    if isinstance(value, list):
        messages = value
    elif not isinstance(value, dict):
        raise DataMistake("is not a conversation")
    elif "messages" in value:
        messages = value["messages"]
        _ignore(value, {"messages"}, notes)
    elif "conversations" in value:
        messages = _with_system(value, _from_sharegpt(value["conversations"]))
        _ignore(value, {"conversations", "system"}, notes)
    elif "instruction" in value and "output" in value:
        messages = _from_alpaca(value)
        _ignore(value, {"instruction", "input", "output", "system", "history"}, notes)
    else:
        raise DataMistake(f"is not a conversation, but an object with {shown(', '.join(value))}")
    if isinstance(messages, list):
        messages = [_message(message, number, notes) for number, message in enumerate(messages, 1)]
    conversation = {"messages": messages}
    check(conversation)
    _check_answers(messages)
    return conversation


def is_trained(conversation: Conversation) -> bool:
    """Return True if there is an answer to learn from."""
    return any(m["role"] == "assistant" and m.get("weight") != 0 for m in conversation["messages"])


def _from_sharegpt(turns: Any) -> Any:
    renamed = {"from": "role", "value": "content"}
    if not isinstance(turns, list):
        return turns
    return [
        {renamed.get(name, name): value for name, value in turn.items()}
        if isinstance(turn, dict) and "from" in turn
        else turn
        for turn in turns
    ]


def _from_alpaca(value: dict[str, Any]) -> Any:
    instruction, given, history = value["instruction"], value.get("input"), value.get("history")
    if given and isinstance(instruction, str) and isinstance(given, str):
        instruction += f"\n\n{given}"
    elif given:
        raise DataMistake("the input is not text")
    turns = history or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataMistake("the history is not a list of [instruction, output]")
    spoken = [text for turn in [*turns, [instruction, value["output"]]] for text in turn]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(spoken)]
    return _with_system(value, messages)


def _with_system(value: dict[str, Any], messages: Any) -> Any:
    if value.get("system") and isinstance(messages, list):
        return [{"role": "system", "content": value["system"]}, *messages]
    return messages


def _message(message: Any, number: int, notes: Counter[str]) -> Any:
    """The message with our roles, and no fields but role, content and weight. Anything else is left to `check`."""
    if not isinstance(message, dict):
        return message
    if called := next((name for name in CALLS if message.get(name)), None):
        raise Unlearnable(
            f"message {number} has {called}, which is not supported. Leave it out, or write a calculator call as "
            'content [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, ...]'
        )
    _ignore(message, {"role", "content", "weight", *CALLS}, notes)
    kept = {name: message[name] for name in ("role", "content") if name in message}
    if message.get("weight") is not None:
        kept["weight"] = message["weight"]
    role, content = kept.get("role"), kept.get("content")
    if isinstance(role, str):
        kept["role"] = SPEAKERS.get(role, role)
    if kept.get("role") != "assistant":
        if "weight" in kept:
            notes["weights of messages that are never trained on ignored"] += 1
            del kept["weight"]
        if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
            kept["content"] = "".join(part["text"] for part in content)
    return kept


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_answers(messages: list[dict[str, Any]]) -> None:
    if messages[-1]["role"] != "assistant":
        raise Unlearnable("the last message of a conversation to learn from must be by the assistant")
    for number, message in enumerate(messages, 1):
        if is_empty_answer(message) and message.get("weight") != 0:
            raise Unlearnable(f'the answer in message {number} is empty. Leave it out, or give it "weight": 0')


def _ignore(value: dict[str, Any], read: set[str], notes: Counter[str]) -> None:
    for name in value.keys() - read:
        if value[name] not in (None, "", [], {}):
            note = f"fields {shown(name)} ignored"
            notes[note if note in notes or len(notes) < MOST_NOTES else "other fields ignored"] += 1
