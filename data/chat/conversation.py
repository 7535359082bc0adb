"""Rendering of conversations as token ids, the same in training, evaluation, chat and export.

A conversation is {"messages": [{"role", "content"}, ...]}: an optional system message first, then user and assistant in
turn. Content is text; an assistant's may also be a list of parts {"type": "text" | "python" | "python_output", "text"}.
An assistant's message may have a weight; one with weight 0 is context for what follows and never trained on.

    <|bos|> <|user_start|> TEXT <|user_end|> <|assistant_start|> TEXT <|assistant_end|> <|user_start|> ...

A tool call is part of the assistant's turn, as <|python_start|> CALL <|python_end|>, and so is its result, as
<|output_start|> RESULT <|output_end|>. A system message is put before the first user message, after it a blank line.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from data.errors import DataMistake
from data.trust import shown

Conversation = dict[str, Any]

BOS = "<|bos|>"
USER = ("<|user_start|>", "<|user_end|>")
ASSISTANT = ("<|assistant_start|>", "<|assistant_end|>")
PARTS = {
    "text": ("", ""),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Encoder(Protocol):
    """A tokenizer, as far as rendering needs it."""

    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...


class Piece(NamedTuple):
    """A special token or a stretch of ordinary text. trained: a model is trained to write it.

    muted: not trained on, even where all other tokens are.
    """

    text: str
    special: bool
    trained: bool
    muted: bool = False


def check(conversation: Any) -> None:
    """Raise DataError if this is not a conversation, with the reason."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataMistake("a conversation is a list of messages, and needs at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataMistake(f"message {i + 1} needs a role and a content")
        if not isinstance(message["role"], str):
            raise DataMistake(f"the role of message {i + 1} is not text")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise DataMistake("a system message alone is not a conversation")
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            number = i + 1 + len(messages) - len(turns)
            raise DataMistake(f"message {number} is by {shown(message['role'])}, expected {expected!r}")
    for i, message in enumerate(messages):
        _check_content(message, f"the content of message {i + 1}")
        if message.get("weight") not in (None, 0, 1):
            raise DataMistake(f"the weight of message {i + 1} is {shown(message['weight'])}, expected 0 or 1")


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message["content"]
    if isinstance(content, str):
        return
    if message["role"] != "assistant" or not isinstance(content, Sequence):
        raise DataMistake(f"{where} is not text")
    for part in content:
        known = isinstance(part, dict) and part.get("type") in list(PARTS)  # a list, as the type may not be hashable
        if not known or not isinstance(part.get("text"), str):
            raise DataMistake(f"{where} has a part that is not {{type: {' | '.join(PARTS)}, text: ...}}")


def pieces(conversation: Conversation) -> Iterator[Piece]:
    """The conversation in order. Trained on: the assistant's text, its calls, and the end of its turn.

    Raises DataError for anything that is not a conversation.
    """
    check(conversation)
    system = ""
    yield Piece(BOS, True, False)
    for message in conversation["messages"]:
        role, content = message["role"], message["content"]
        if role == "system":
            system = content + "\n\n"
        elif role == "user":
            yield Piece(USER[0], True, False)
            yield Piece(system + content, False, False)
            yield Piece(USER[1], True, False)
            system = ""
        else:
            muted = message.get("weight") == 0
            yield Piece(ASSISTANT[0], True, False)
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for is_text, parts in groupby(content, key=lambda part: part["type"] == "text"):
                # Neighbouring texts are one text, or their tokens would differ from those of the template's output.
                for part in [{"type": "text", "text": "".join(part["text"] for part in parts)}] if is_text else parts:
                    start, end = PARTS[part["type"]]
                    trained = part["type"] != "python_output" and not muted
                    if start:
                        yield Piece(start, True, trained, muted)
                    yield Piece(part["text"], False, trained, muted)
                    if end:
                        yield Piece(end, True, trained, muted)
            yield Piece(ASSISTANT[1], True, not muted, muted)


def is_empty_answer(message: dict[str, Any]) -> bool:
    """Return True for a checked assistant message without text or calls."""
    return message["role"] == "assistant" and not text_of(message["content"]).strip()


def encoded(conversation: Conversation, tokenizer: Encoder) -> Iterator[tuple[list[int], Piece]]:
    """The pieces of a conversation with their ids. Raises DataError for an invalid conversation."""
    for piece in pieces(conversation):
        yield [tokenizer.special[piece.text]] if piece.special else tokenizer.encode(piece.text), piece


def render(conversation: Conversation, tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """(ids, mask), equally long; mask is 1 for the tokens that the model is trained to write.

    Special tokens are never read from text: "<|bos|>" in a message is seven ordinary characters.
    """
    ids: list[int] = []
    mask: list[int] = []
    for tokens, piece in encoded(conversation, tokenizer):
        ids += tokens
        mask += [int(piece.trained)] * len(tokens)
    return ids, mask


def render_prompt(conversation: Conversation, tokenizer: Encoder) -> list[int]:
    """Ids up to and including <|assistant_start|> of the turn to generate.

    That is the last assistant message's (whose content is left out) or, after a last user message, the next one.
    """
    messages = conversation["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render({"messages": messages}, tokenizer)
    return [*ids, tokenizer.special[ASSISTANT[0]]]


_TOOL_USE = re.compile(
    r"<\|python_start\|>.*?(?:<\|python_end\|>|$)|<\|output_start\|>.*?(?:<\|output_end\|>|$)|<\|[a-z_]+\|>", re.DOTALL
)


def spoken(completion: str) -> str:
    """The part of a decoded completion that the user reads: without tool calls, their results and special tokens."""
    return _TOOL_USE.sub("", completion)


def text_of(content: str | list[dict[str, str]]) -> str:
    """A message's content as one text, with its tool calls and their results."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
