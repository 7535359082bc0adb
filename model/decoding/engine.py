"""Generating text: many prompts at once through one static cache, each row with its own settings and its own tools.

Rows that finish make room for waiting ones. When a row writes a python call, the tool's answer is forced into it and
flagged, so that it is not trained on.
"""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from model.decoding.batch import Batch, Finish, Row
from model.decoding.sampling import Sampling
from model.errors import ModelError
from model.gpt import GPT
from model.kernels.decoder import Decoder, decoder_of

REPLY_PART = 4  # prompts are shortened so that at least a fourth of the context is left for the reply


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
        """The events of one more token. forced: a tool wrote it; a tool result that the model makes up is text."""
        if token in self.begins and (forced or self.begins[token] == "tool_call"):
            yield from self.close()
            self.inside = self.begins[token]
        elif token in self.ends and self.inside is not None:
            yield from self.close()
        elif token not in self.silent:
            self.held += self.decoder.decode(self.decode_bytes([token]))
            if self.inside is None:
                yield from self._say(self._sure())

    def close(self) -> Iterator[Event]:
        """What is left at the end of a stretch of text, of a call or of a result."""
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


@dataclass(frozen=True)
class Completion:
    """What came after a prompt.

    prompt: the ids that were read, without the turns that did not fit. tokens: all that follows, with the token that
    ended it. forced[i]: tokens[i] is a tool's output, not the model's. logprobs[i]: natural logarithm of its
    probability at the temperature, before any limit, if asked for. finish: "end" (the model ended its turn or the
    text), "length", "stop" (a stop text), "cancelled".
    """

    prompt: list[int]
    tokens: list[int]
    forced: list[bool]
    logprobs: list[float] | None
    finish: Finish
    dropped_turns: int = 0

    @property
    def written(self) -> list[int]:
        """The tokens without the one that ended the turn."""
        return self.tokens[:-1] if self.finish == "end" else self.tokens


class Engine:
    """Generates with a model whose weights it shares: change them, and the next call uses the new ones.

    special: ids of the special tokens by name. decode_bytes, encode: of the tokenizer. tools: the text of a python call
    -> its result, or None for a call without one, after which the model continues. rows: completions decoded side by
    side. decoder: of a model whose weights will not change, made once for all calls.
    """

    def __init__(
        self,
        model: GPT,
        special: Mapping[str, int],
        decode_bytes: Callable[[list[int]], bytes],
        encode: Callable[[str], list[int]],
        tools: Callable[[str], str | None] | None = None,
        rows: int = 64,
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self.rows, self.decoder = model, rows, decoder
        self.special, self.decode_bytes, self.encode, self.tools = special, decode_bytes, encode, tools
        self.context: int = model.config.sequence_len
        self.ends = {special["<|assistant_end|>"], special["<|bos|>"]}
        self.python_start, self.python_end = special["<|python_start|>"], special["<|python_end|>"]

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (frozen)
        samples: int = 1,
        logprobs: bool = False,
        should_stop: Callable[[], bool] | None = None,
        finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """`samples` completions of each prompt, those of one prompt together and in order.

        sampling: for all, or one per prompt. A prompt longer than the context allows loses its oldest turns (see
        Completion.dropped_turns). When should_stop() turns true, unfinished completions are returned as "cancelled".
        finished(place in the list, completion) is called as soon as one has ended by itself.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        rows = [self.row(i, j, prompt, each[i]) for i, prompt in enumerate(prompts) for j in range(samples)]
        places = {id(row): place for place, row in enumerate(rows)}
        for done in self.decode(rows, logprobs):
            if finished is not None:
                for row in done:
                    finished(places[id(row)], self.completion(row, logprobs))
            if should_stop is not None and should_stop():
                break
        return [self.completion(row, logprobs) for row in rows]

    def row(self, number: int, sample: int, prompt: list[int], sampling: Sampling) -> Row:
        sampling.check()
        if not prompt:
            raise ModelError("a prompt needs at least one token; start it with <|bos|>")
        reply = min(sampling.max_tokens, max(1, self.context // REPLY_PART))
        prompt, dropped = drop_oldest_turns(prompt, self.context - reply, self.special)
        row = Row(number, sample, prompt, sampling, dropped, min(sampling.max_tokens, self.context - len(prompt)))
        if sampling.stop:
            row.pieces = Pieces(self.special, self.decode_bytes, sampling.stop)
        return row

    def completion(self, row: Row, logprobs: bool) -> Completion:
        finish = row.finish or "cancelled"
        scores = row.logprobs if logprobs else None
        return Completion(row.prompt, row.tokens, row.forced, scores, finish, row.dropped_turns)

    def decode(self, rows: list[Row], logprobs: bool = False) -> Iterator[list[Row]]:
        """Generate until all rows have ended. After each token of all active rows, yields those that ended with it."""
        if not rows:
            return
        batch = Batch(self, rows, logprobs, self.decoder or decoder_of(self.model))
        try:
            while batch.active:
                yield batch.take_finished()
                batch.step()
            yield batch.take_finished()
        finally:
            batch.end()

    def stream(
        self,
        prompt: list[int],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """One completion as it is made: text in whole characters, tool calls and results, and an "end" event last."""
        row = self.row(0, 0, prompt, sampling)
        pieces = Pieces(self.special, self.decode_bytes, sampling.stop)
        read = 0
        for _ in self.decode([row]):
            for token, forced in zip(row.tokens[read:], row.forced[read:]):
                yield from pieces.feed(token, forced)
            read = len(row.tokens)
            if should_stop is not None and row.finish is None and should_stop():
                break
        yield from pieces.close()
        yield Event("end", "", row.finish or "cancelled", len(row.tokens), row.dropped_turns)

    def take(self, row: Row, token: int) -> int:
        """Append `token` to the row, or tool output that is due instead, and act on it. Returns what was appended."""
        forced = bool(row.waiting)
        if forced:
            token = row.waiting.popleft()
        row.tokens.append(token)
        row.forced.append(forced)
        row.room -= 1
        if not forced:
            self._react(row, token)
        if row.pieces is not None and row.finish is None:
            for _ in row.pieces.feed(token, forced):
                """Only whether a stop text was found matters here."""
            if row.pieces.stopped:
                row.finish = "stop"
        if row.finish is None and row.room <= 0:
            row.finish = "length"
        return token

    def _react(self, row: Row, token: int) -> None:
        if token in self.ends:
            row.finish = "end"
        elif token == self.python_start:
            row.call = []
        elif token == self.python_end and row.call is not None:
            call = self.decode_bytes(row.call).decode(errors="replace")
            result = self.tools(call) if self.tools is not None else None
            row.call = None
            if result is not None:
                output = [self.special["<|output_start|>"], *self.encode(result), self.special["<|output_end|>"]]
                row.waiting.extend(output)
        elif row.call is not None:
            row.call.append(token)


def rows_that_fit(model: GPT) -> int:
    """Completions to decode side by side: on a GPU as many as half of its free memory can cache, elsewhere 64."""
    device = model.lm_head.weight.device
    if device.type != "cuda":
        return 64
    config, element = model.config, torch.finfo(model.compute_dtype).bits // 8
    row_bytes = 2 * config.depth * config.kv_width * config.sequence_len * element
    return int(min(256, max(1, torch.cuda.mem_get_info(device)[0] // 2 // row_bytes)))


def drop_oldest_turns(prompt: list[int], limit: int, special: Mapping[str, int]) -> tuple[list[int], int]:
    """(ids, turns dropped): a prompt of at most `limit` tokens that keeps its first token and its latest turns.

    A turn begins at <|user_start|>. A last turn that is too long by itself (or a text without turns) loses its
    beginning, which counts as a dropped turn too.
    """
    if len(prompt) <= limit:
        return prompt, 0
    starts = [place for place, token in enumerate(prompt) if token == special["<|user_start|>"]]
    for dropped, start in enumerate(starts):
        if 1 + len(prompt) - start <= limit:
            return [prompt[0], *prompt[start:]], max(1, dropped)
    head = [prompt[0], special["<|user_start|>"]] if starts else prompt[:1]
    head = head[: max(1, limit - 1)]
    return [*head, *prompt[len(prompt) - max(limit - len(head), 0) :]], max(1, len(starts))
