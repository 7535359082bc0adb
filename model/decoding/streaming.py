"""From tokens, one at a time, to what a person sees: whole characters, tool calls and their results."""

import codecs
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """A piece of text, a whole tool call, a whole tool result, or the end.

    At the end, finish says why ("end", "length", "stop", "cancelled"), tokens how many were made, and dropped_turns
    how many of the oldest turns the model did not see because they did not fit.
    """

    kind: Literal["text", "tool_call", "tool_output", "end"]
    text: str = ""
    finish: str = ""
    tokens: int = 0
    dropped_turns: int = 0


class Pieces:
    """Turns the tokens of one completion into events.

    A character is sent when all its bytes are there. Text that may be the beginning of a stop text is held back until
    it is known not to be one.
    """

    def __init__(
        self, special: Mapping[str, int], decode_bytes: Callable[[list[int]], bytes], stop: tuple[str, ...] = ()
    ) -> None:
        self.decode_bytes, self.stop = decode_bytes, stop
        self.begins = {special["<|python_start|>"]: "tool_call", special["<|output_start|>"]: "tool_output"}
        self.ends = {special["<|python_end|>"], special["<|output_end|>"]}
        self.silent = set(special.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.inside: str | None = None
        self.held = ""
        self.stopped = False

    def feed(self, token: int, forced: bool) -> Iterator[Event]:
        """The events that one more token brings. forced: it is a tool's; a result that the model makes up is text."""
        if token in self.begins and (forced or self.begins[token] == "tool_call"):
            yield from self._close()
            self.inside = self.begins[token]
        elif token in self.ends and self.inside is not None:
            yield from self._close()
        elif token not in self.silent:
            self.held += self.decoder.decode(self.decode_bytes([token]))
            if self.inside is None:
                yield from self._say(self._sure())

    def finish(self) -> Iterator[Event]:
        """What is left when no token follows."""
        yield from self._close()

    def _close(self) -> Iterator[Event]:
        """The end of a stretch of text, of a call or of a result."""
        self.held += self.decoder.decode(b"", final=True)
        self.decoder.reset()
        if self.inside is None:
            self._cut()
            yield from self._say(len(self.held))
        else:
            yield Event(self.inside, self.held)  # type: ignore[arg-type]
            self.held, self.inside = "", None

    def _sure(self) -> int:
        """How many of the held characters can no longer be part of a stop text."""
        if self._cut():
            return len(self.held)
        for back in range(min(len(self.held), max(map(len, self.stop), default=0)), 0, -1):
            if any(text.startswith(self.held[-back:]) for text in self.stop):
                return len(self.held) - back
        return len(self.held)

    def _cut(self) -> bool:
        """Drop a stop text and what follows it."""
        places = [self.held.find(text) for text in self.stop if text in self.held]
        if places:
            self.held, self.stopped = self.held[: min(places)], True
        return bool(places)

    def _say(self, count: int) -> Iterator[Event]:
        text, self.held = self.held[:count], self.held[count:]
        if text:
            yield Event("text", text)
