"""A conversation with one model, whatever shows it: the app, the HTTP API and the terminal all talk through here."""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from data.chat.conversation import BOS, Encoder, check, render, render_prompt, text_of
from pipeline.errors import UserError

MOST_MESSAGES = 10_000  # of a conversation
MOST_CHARACTERS = 100_000  # of a message
LARGEST_SEED = 2**63 - 1
POLL_SECONDS = 0.1  # between checks for a waiting client that has left

Message = dict[str, Any]  # {"role", "content"} as in data.chat.conversation


@dataclass(frozen=True)
class ChatSettings:
    """How an answer is drawn. temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None  # None: another answer each time

    def check(self) -> None:
        """Raises UserError for a value that means nothing."""
        if not 0.0 <= self.temperature <= 10.0:
            raise UserError(f"is {self.temperature:g}", "temperature", "It must be between 0 and 10.")
        if self.top_k < 0:
            raise UserError(f"is {self.top_k}", "top_k", "It must be 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"is {self.top_p:g}", "top_p", "It must be above 0 and at most 1.")
        if self.max_tokens < 1:
            raise UserError(f"is {self.max_tokens}", "max_tokens", "It must be at least 1.")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"is {self.seed}", "seed", f"It must be between 0 and {LARGEST_SEED}.")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model asked the calculator."""

    text: str


@dataclass(frozen=True)
class ToolOutput:
    """What the calculator said."""

    text: str


@dataclass(frozen=True)
class End:
    """reason: end (the model was done) | length (max_tokens or the context was full) | stop (somebody stopped it).

    forgotten: turns at the beginning of the conversation that no longer fitted in the context.
    """

    reason: Literal["end", "length", "stop"]
    tokens: int
    seconds: float
    forgotten: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """One line for the person who reads the answer."""
        parts = [f"{self.tokens:,} token{'s' * (self.tokens != 1)}", f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += {"length": ["cut off at the limit"], "stop": ["stopped"], "end": []}[self.reason]
        if self.forgotten:
            parts.append(f"the first {self.forgotten} messages no longer fit in the context")
        return " · ".join(parts)


Event = Text | ToolCall | ToolOutput | End


class Generate(Protocol):
    """What a session needs of an engine: the answer to a prompt of token ids, ending with exactly one End."""

    def __call__(
        self, prompt: list[int], settings: ChatSettings, should_stop: Callable[[], bool]
    ) -> Iterator[Event]: ...


@dataclass
class Draft:
    """An answer as it comes in, in the form in which it then belongs to the conversation."""

    parts: list[dict[str, str]] = field(default_factory=list)
    end: End | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, End):
            self.end = event
        elif isinstance(event, Text) and self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1] = {"type": "text", "text": self.parts[-1]["text"] + event.text}
        else:
            kind = {Text: "text", ToolCall: "python", ToolOutput: "python_output"}[type(event)]
            self.parts.append({"type": kind, "text": event.text})

    @property
    def text(self) -> str:
        """What is said, without tool calls and their results."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def message(self) -> Message:
        only_text = all(part["type"] == "text" for part in self.parts)
        return {"role": "assistant", "content": self.text if only_text else list(self.parts)}


class ChatSession:
    """One loaded model. Answers one conversation at a time; others wait.

    continues: a base model, which was not taught to chat; it goes on with the text of the last message alone.
    """

    def __init__(self, generate: Generate, tokenizer: Encoder, context: int, continues: bool = False):
        self._generate, self._tokenizer, self.context, self.continues = generate, tokenizer, context, continues
        self._busy = threading.Lock()

    @classmethod
    def load(cls, model: Path, tokenizer: Path, device: str = "auto") -> "ChatSession":
        """The model artifact in `model` with the tokenizer artifact in `tokenizer`. Raises ModelError, DataError."""
        from pipeline.ui.loading import load

        return cls(*load(model, tokenizer, device))

    def reply(
        self,
        messages: Iterable[Message],
        settings: ChatSettings | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Generator[Event]:
        """The next answer of a conversation that ends with a user's message, piece by piece; the last event is End.

        Closing the iterator, or `should_stop`, ends the answer, and the wait for earlier ones. Raises UserError for
        a message that does not fit by itself, and for a conversation above MOST_MESSAGES or MOST_CHARACTERS.
        """
        settings = settings or ChatSettings()
        settings.check()
        prompt, forgotten = self._fit(list(messages), settings)
        room = self.context - len(prompt)
        limits = ChatSettings(
            settings.temperature,
            settings.top_k,
            settings.top_p,
            min(settings.max_tokens, room),
            secrets.randbits(31) if settings.seed is None else settings.seed,
        )
        while not self._busy.acquire(timeout=POLL_SECONDS):
            if should_stop():
                yield End("stop", 0, 0.0, forgotten)
                return
        try:
            started = time.monotonic()
            for event in self._generate(prompt, limits, should_stop):
                if isinstance(event, End):
                    event = End(event.reason, event.tokens, time.monotonic() - started, forgotten)
                yield event
        finally:
            self._busy.release()

    def _fit(self, messages: list[Message], settings: ChatSettings) -> tuple[list[int], int]:
        """(prompt ids, messages left out): the oldest turns go until an answer has room; the system message stays.

        Counted from the end, so that of a long conversation only the part that fits is encoded.
        """
        _check_size(messages)
        if messages:
            check({"messages": messages})
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        turns = messages[-1:] if self.continues else messages[len(system) :]
        if not turns or turns[-1]["role"] != "user":
            raise UserError("there is no message to answer")
        encoder = _Once(self._tokenizer)
        room = self.context - min(settings.max_tokens, self.context // 4)
        start = len(turns) - 1
        length = len(self._prompt(system, turns[start:], encoder))
        while start >= 2 and length <= room:
            length += len(render({"messages": turns[start - 2 : start]}, encoder)[0]) - 1  # without its <|bos|>
            start -= 2
        prompt = self._prompt(system, turns[start:], encoder)
        while len(prompt) > room and start + 2 < len(turns):
            start += 2
            prompt = self._prompt(system, turns[start:], encoder)
        if len(prompt) >= self.context:
            raise UserError(
                f"the message takes {len(prompt)} tokens with the system prompt, the model reads {self.context}",
                fix="Shorten it.",
            )
        return prompt, start

    def _prompt(self, system: list[Message], turns: list[Message], encoder: Encoder) -> list[int]:
        if self.continues:
            return [encoder.special[BOS], *encoder.encode(text_of(turns[-1]["content"]))]
        return render_prompt({"messages": system + turns}, encoder)


class _Once:
    """A tokenizer that encodes a text only once."""

    def __init__(self, tokenizer: Encoder):
        self.special, self.encode = tokenizer.special, cache(tokenizer.encode)


def _check_size(messages: list[Message]) -> None:
    """Raises UserError for a conversation or message above its limit, before anything else reads it."""
    if len(messages) > MOST_MESSAGES:
        raise UserError(f"there are {len(messages):,} messages", "messages", f"Send {MOST_MESSAGES:,} at most.")
    for i, message in enumerate(messages):
        length = _length(message.get("content")) if isinstance(message, dict) else 0
        if length > MOST_CHARACTERS:
            what = f"message {i + 1} has {length:,} characters"
            raise UserError(what, "messages", f"Shorten it to {MOST_CHARACTERS:,} at most.")


def _length(content: Any) -> int:
    """Characters of a content, each part of a list counted as one at least."""
    if isinstance(content, list):
        return sum(max(1, _length(part.get("text")) if isinstance(part, dict) else 1) for part in content)
    return len(content) if isinstance(content, str) else 0
