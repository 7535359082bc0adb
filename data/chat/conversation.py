"""From a conversation to token ids, the same way in training, evaluation, chat and export.

A conversation is {"messages": [{"role", "content"}, ...]}: an optional system message first, then user and assistant in
turn. Content is text; an assistant's may also be a list of parts {"type": "text" | "python" | "python_output", "text"}.
An assistant's message may have a weight; one with weight 0 is context for what follows and never trained on.

    <|bos|> <|user_start|> TEXT <|user_end|> <|assistant_start|> TEXT <|assistant_end|> <|user_start|> ...

A tool call stands inside the assistant's turn as <|python_start|> CALL <|python_end|> and its result as
<|output_start|> RESULT <|output_end|>. A system message goes in front of the first user message, a blank line between.
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
    """What rendering needs of a tokenizer."""

    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...


class Piece(NamedTuple):
    """A special token or a stretch of ordinary text, and whether a model is trained to write it.

    muted: not trained on, even where all other tokens are.
    """

    text: str
    special: bool
    trained: bool
    muted: bool = False


def check(conversation: Any) -> None:
    """Raise DataError saying what is wrong, if this is no conversation."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataMistake("a conversation is a list of messages, and needs at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataMistake(f"message {i + 1} needs a role and a content")
        if not isinstance(message["role"], str):
            raise DataMistake(f"the role of message {i + 1} is no text")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise DataMistake("a system message alone is no conversation")
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            raise DataMistake(
                f"message {i + 1 + len(messages) - len(turns)} is by {shown(message['role'])} where {expected!r} is due"
            )
    for i, message in enumerate(messages):
        _check_content(message, f"the content of message {i + 1}")
        if message.get("weight") not in (None, 0, 1):
            raise DataMistake(f"the weight of message {i + 1} is {shown(message['weight'])}, expected 0 or 1")


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message["content"]
    if isinstance(content, str):
        return
    if message["role"] != "assistant" or not isinstance(content, Sequence):
        raise DataMistake(f"{where} is no text")
    for part in content:
        known = isinstance(part, dict) and part.get("type") in list(PARTS)  # what is in a list need not be hashable
        if not known or not isinstance(part.get("text"), str):
            raise DataMistake(f"{where} has a part that is not {{type: {' | '.join(PARTS)}, text: ...}}")


def pieces(conversation: Conversation) -> Iterator[Piece]:
    """The conversation in order. Trained on: the assistant's text, its calls, and the end of its turn.

    Raises DataError for what is no conversation.
    """
    check(conversation)
    messages = conversation["messages"]
    system = ""
    yield Piece(BOS, True, False)
    for message in messages:
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
            for kind, parts in groupby(_parts(content), key=lambda part: part["type"] == "text"):
                # Neighbouring texts are one text, or their tokens would not be those of what the template writes.
                for part in [{"type": "text", "text": "".join(part["text"] for part in parts)}] if kind else parts:
                    yield from _part(part, muted)
            yield Piece(ASSISTANT[1], True, not muted, muted)


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, str], muted: bool) -> Iterator[Piece]:
    start, end = PARTS[part["type"]]
    trained = part["type"] != "python_output" and not muted
    if start:
        yield Piece(start, True, trained, muted)
    yield Piece(part["text"], False, trained, muted)
    if end:
        yield Piece(end, True, trained, muted)


def is_empty_answer(message: dict[str, Any]) -> bool:
    """Return True for a checked assistant message without text or calls."""
    return message["role"] == "assistant" and not text_of(message["content"]).strip()


def encoded(conversation: Conversation, tokenizer: Encoder) -> Iterator[tuple[list[int], Piece]]:
    """The pieces of a conversation with their ids. Raises DataError for an invalid conversation."""
    for piece in pieces(conversation):
        yield [tokenizer.special[piece.text]] if piece.special else tokenizer.encode(piece.text), piece


def render(conversation: Conversation, tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """(ids, mask), equally long; mask is 1 where the token is one the model is trained to write.

    Special tokens are never read from text: "<|bos|>" in a message is seven ordinary characters.
    """
    ids: list[int] = []
    mask: list[int] = []
    for tokens, piece in encoded(conversation, tokenizer):
        ids += tokens
        mask += [int(piece.trained)] * len(tokens)
    return ids, mask


def render_prompt(conversation: Conversation, tokenizer: Encoder) -> list[int]:
    """Ids up to and including <|assistant_start|> of the turn to be written.

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
    """What a decoded completion says to the user: tool calls, their results and special tokens left out."""
    return _TOOL_USE.sub("", completion)


def text_of(content: str | list[dict[str, str]]) -> str:
    """A message's content as one text, its tool calls and their results in place."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
