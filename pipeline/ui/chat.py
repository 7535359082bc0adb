"""A conversation with one model. The app, the HTTP API and the terminal all use it."""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from data.chat.conversation import BOS, Encoder, check, render, render_prompt, text_of
from pipeline.errors import UserError
from pipeline.numbers import plural

if TYPE_CHECKING:
    from data.tokens.tokenizer import Tokenizer

MOST_MESSAGES = 10_000  # of a conversation
MOST_CHARACTERS = 100_000  # of a message
LARGEST_SEED = 2**63 - 1
POLL_SECONDS = 0.1  # between checks for a waiting client that has left

Message = dict[str, Any]  # {"role", "content"} as in data.chat.conversation


@dataclass(frozen=True)
class ChatSettings:
    """Sampling of an answer. temperature 0 takes the likeliest token; top_k 0 and top_p 1 exclude no token."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None  # None: another answer each time

    def check(self) -> None:
        """Raises UserError for a value out of range."""
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
    """A question of the model to the calculator."""

    text: str


@dataclass(frozen=True)
class ToolOutput:
    """The calculator's answer."""

    text: str


@dataclass(frozen=True)
class End:
    """reason: end (of the model's answer) | length (max_tokens or the context was reached) | stop (by the user).

    forgotten: messages at the beginning of the conversation that no longer fit in the context.
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
        parts = [plural(self.tokens, "token"), f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += {"length": ["cut off at the limit"], "stop": ["stopped"], "end": []}[self.reason]
        if self.forgotten:
            parts.append(f"the first {self.forgotten} messages no longer fit in the context")
        return " · ".join(parts)


Event = Text | ToolCall | ToolOutput | End


class Generate(Protocol):
    """An engine as a session needs it: the answer to a prompt of token ids, ending with exactly one End."""

    def __call__(self, prompt: list[int], settings: ChatSettings, stop: Callable[[], bool]) -> Iterator[Event]: ...


@dataclass
class Draft:
    """An answer as it arrives, in the form in which it joins the conversation."""

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
        """The answer without tool calls and their results."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def message(self) -> Message:
        only_text = all(part["type"] == "text" for part in self.parts)
        return {"role": "assistant", "content": self.text if only_text else list(self.parts)}


class ChatSession:
    """One loaded model. Answers one conversation at a time; others wait.

    continues: a base model, which was not trained to chat. It continues the text of the last message alone.
    """

    def __init__(self, generate: Generate, tokenizer: Encoder, context: int, continues: bool = False):
        self._generate, self._tokenizer, self.context, self.continues = generate, tokenizer, context, continues
        self._busy = threading.Lock()

    @classmethod
    def load(cls, model: Path, tokenizer: Path, device: str = "auto") -> "ChatSession":
        """The model artifact in `model` with the tokenizer artifact in `tokenizer`. Raises ModelError, DataError."""
        return cls(*_load(model, tokenizer, device))

    def reply(
        self,
        messages: Iterable[Message],
        settings: ChatSettings | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Generator[Event]:
        """Stream the answer to a conversation that ends with a user's message. The last event is End.

        Closing the iterator ends the answer; `should_stop` also ends the wait for earlier answers. Raises UserError for
        a message that does not fit by itself, and for a conversation above MOST_MESSAGES or MOST_CHARACTERS.
        """
        settings = settings or ChatSettings()
        settings.check()
        prompt, forgotten = self._fit(list(messages), settings)
        room = self.context - len(prompt)
        seed = secrets.randbits(31) if settings.seed is None else settings.seed
        limits = replace(settings, max_tokens=min(settings.max_tokens, room), seed=seed)
        while not self._busy.acquire(timeout=POLL_SECONDS):
            if should_stop():
                yield End("stop", 0, 0.0, forgotten)
                return
        try:
            started = time.monotonic()
            for event in self._generate(prompt, limits, should_stop):
                if isinstance(event, End):
                    event = replace(event, seconds=time.monotonic() - started, forgotten=forgotten)
                yield event
        finally:
            self._busy.release()

    def _fit(self, messages: list[Message], settings: ChatSettings) -> tuple[list[int], int]:
        """(prompt ids, messages left out). The oldest turns are dropped until an answer fits; the system message stays.

        Works from the end, so that only the part of a long conversation that fits is encoded.
        """
        _check_size(messages)
        if messages:
            check({"messages": messages})
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        turns = messages[-1:] if self.continues else messages[len(system) :]
        if not turns or turns[-1]["role"] != "user":
            raise UserError("there is no message to answer", "messages")
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
            what = f"the message and the system prompt take {len(prompt)} tokens, but the context has {self.context}"
            raise UserError(what, fix="Shorten it.")
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
    """Characters of a content. Each part of a list counts as at least one."""
    if isinstance(content, list):
        return sum(max(1, _length(part.get("text")) if isinstance(part, dict) else 1) for part in content)
    return len(content) if isinstance(content, str) else 0


def _load(model: Path, tokenizer: Path, device: str) -> "tuple[Generate, Tokenizer, int, bool]":
    """The arguments of a ChatSession. Only this function knows the engine."""
    from data.chat.calculator import calculate
    from data.tokens.tokenizer import Tokenizer
    from model.decoding.engine import Engine
    from model.decoding.sampling import Sampling
    from model.device import choose_device
    from model.kernels.decoder import decoder_of
    from model.precision import resolve_dtype
    from model.saved import load_model
    from pipeline.artifacts.artifact import read_marker
    from pipeline.artifacts.store import Store

    vocabulary = Tokenizer.load(tokenizer)
    where = choose_device(device)
    network = load_model(model, where, resolve_dtype("auto", where))
    codec = vocabulary.decode_bytes, vocabulary.encode
    engine = Engine(network, vocabulary.special, *codec, calculate, rows=1, decoder=decoder_of(network, in_place=True))
    kinds: dict[str, Callable[[str], Event]] = {"text": Text, "tool_call": ToolCall, "tool_output": ToolOutput}

    def generate(prompt: list[int], settings: ChatSettings, stop: Callable[[], bool]) -> Iterator[Event]:
        sampling = Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p if settings.top_p < 1 else None,
            seed=settings.seed or 0,
            max_tokens=settings.max_tokens,
        )
        for event in engine.stream(prompt, sampling, stop):
            if event.kind in kinds:
                yield kinds[event.kind](event.text)
            else:
                reason = {"cancelled": "stop", "length": "length"}.get(event.finish, "end")
                yield End(reason, event.tokens, 0.0)  # type: ignore[arg-type]

    context = int(network.config.sequence_len)  # type: ignore[union-attr, arg-type]
    origin = Store.read(model) or read_marker(model)
    return generate, vocabulary, context, origin is not None and origin.module == "pretrain"
