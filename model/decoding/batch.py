"""Rows of text that are generated side by side: a cache with a slot for each, and a queue of waiting ones."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from model.decoding.kvcache import KVCache
from model.decoding.sampling import Cap, Sampler, Sampling
from model.kernels.decoder import Decoder
from model.kernels.graphs import Drawn, rows_for

if TYPE_CHECKING:
    from model.decoding.engine import Engine, Pieces

Finish = Literal["end", "length", "stop", "cancelled"]

PREFILL_TOKENS = 16_384  # of one pass over waiting prompts, padding included


@dataclass
class Row:
    """One completion being made."""

    number: int  # of the prompt
    sample: int
    prompt: list[int]
    sampling: Sampling
    dropped_turns: int
    room: int  # tokens that may still come
    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)  # tool output still to be forced
    call: list[int] | None = None  # tokens of the python call being written
    pieces: "Pieces | None" = None  # looks for stop texts, where there are any
    finish: Finish | None = None


class Batch:
    """The rows of one call of decode()."""

    # Inference mode is entered call by call: held open in a generator, it would stay on in the code that reads from it.
    @torch.inference_mode()
    def __init__(self, engine: "Engine", rows: list[Row], logprobs: bool, decoder: Decoder | None) -> None:
        self.engine, self.model, self.decoder, self.logprobs = engine, engine.model, decoder, logprobs
        self.queue = deque(sorted(rows, key=lambda row: -len(row.prompt)))  # stable: samples of a prompt stay together
        self.finished: list[Row] = []
        slots, length = min(engine.rows, len(rows)), max(len(row.prompt) + row.room for row in rows)
        rounded = min(engine.rows, rows_for(slots))
        self.replay = decoder.borrow(rounded, length) if decoder is not None else None
        if self.replay is not None:
            slots = rounded
            self.replay.restart(slots, rows[0].sampling)
            self.cache: KVCache = self.replay.cache
            self.sampler = self.replay.sampler
        else:
            self.cache = self._new_cache(slots, length)
            vocab_size = self.model.lm_head.weight.size(0)
            self.sampler = Sampler(slots, max(row.room for row in rows), vocab_size, engine.device)
        self.slots: list[Row | None] = [None] * slots
        self.decoder_step = decoder.step(slots, self.replay) if decoder is not None else None
        self._admit()

    @property
    def active(self) -> bool:
        return any(row is not None for row in self.slots)

    def end(self) -> None:
        """Give back what was borrowed from the decoder. Nothing is called afterwards."""
        if self.decoder is not None and self.replay is not None:
            self.decoder.give_back(self.replay)

    def take_finished(self) -> list[Row]:
        taken, self.finished = self.finished, []
        return taken

    def _new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache(self.model.config, rows, length, self.engine.device, self.model.compute_dtype)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row in a slot; then fill the free slots, or give them up when no row waits."""
        tokens = [row.tokens[-1] if row else 0 for row in self.slots]
        if self.replay is not None:
            drawn = self.replay.step(tokens, self._step, self.logprobs)
        else:
            drawn = self._step(torch.tensor(tokens, device=self.engine.device))
        self.cache.advance([int(row is not None) for row in self.slots])
        self._take(list(range(len(self.slots))), *drawn)
        free = self._release()
        if self.queue and free * 8 >= len(self.slots):
            self._admit()
        elif not self.queue and free * 2 >= len(self.slots) and self.active:
            self._shrink()

    def _step(self, feed: Tensor) -> Drawn:
        """The tokens that follow `feed` (rows,), the latest ones of all slots."""
        slots, step = list(range(len(feed))), self.decoder_step
        if step is None:
            return self._draw(self.model.head(self.model.hidden(feed[:, None], self.cache)[:, 0]), slots)
        return self._draw(step.logits(step.hidden(feed, self.cache)), slots, self.model.cap)

    def _draw(self, logits: Tensor, slots: list[int], cap: Cap | None = None) -> Drawn:
        """A token for each of these slots, drawn from its line of logits (N, vocab). cap: as in Sampler.draw."""
        tokens = self.sampler.draw(logits, slots, cap)
        if not self.logprobs:
            return tokens, None
        return tokens, logits if cap is None else cap(logits)

    def _take(self, slots: list[int], tokens: Tensor, logits: Tensor | None) -> None:
        """Append to the rows in these slots the tokens drawn for them, or the tool output that is due instead."""
        rows = [self.slots[slot] for slot in slots]
        chosen = [self.engine.take(row, token) if row else 0 for row, token in zip(rows, tokens.tolist())]
        self.sampler.saw(slots, chosen)
        if logits is not None:
            places = torch.tensor(chosen, device=logits.device)[:, None]
            scores = self.sampler.cool(logits, slots).log_softmax(-1).gather(1, places)[:, 0].tolist()
            for row, score in zip(rows, scores):
                if row is not None:
                    row.logprobs.append(score)

    def _release(self) -> int:
        """Empty the slots of finished rows; returns how many slots are free."""
        for slot, row in enumerate(self.slots):
            if row is not None and row.finish is not None:
                self.finished.append(row)
                self.slots[slot] = None
                self.cache.clear(slot)
        return self.slots.count(None)

    def _shrink(self) -> None:
        """Give up free slots."""
        taken = [slot for slot, row in enumerate(self.slots) if row is not None]
        spare = rows_for(len(taken)) - len(taken) if self.replay is not None else 0
        kept = taken + taken[:1] * spare
        self.cache.select(kept)
        self.sampler.select(kept)
        self.slots = [self.slots[slot] for slot in taken] + [None] * spare
        for slot in range(len(taken), len(kept)):
            self.cache.clear(slot)
        self.decoder_step = self.decoder.step(len(self.slots), self.replay) if self.decoder is not None else None

    def _admit(self) -> None:
        """Read waiting prompts, each once for all of its samples, and give their rows a slot and a first token."""
        while self.queue and None in self.slots:
            prompts: dict[int, list[int]] = {}
            rows: dict[int, Row] = {}
            for slot in [slot for slot, row in enumerate(self.slots) if row is None]:
                longest = max((len(prompt) for prompt in prompts.values()), default=0)
                if not self.queue or (prompts and (len(prompts) + 1) * longest > PREFILL_TOKENS):
                    break
                row = self.queue.popleft()
                prompts.setdefault(row.number, row.prompt)
                rows[slot] = self.slots[slot] = row
            self._start(prompts, rows)
            self._release()

    def _start(self, prompts: dict[int, list[int]], rows: dict[int, Row]) -> None:
        place = {number: at for at, number in enumerate(prompts)}
        hidden, cache = self._prefill(list(prompts.values()))
        at = [place[row.number] for row in rows.values()]
        self.cache.adopt(list(rows), cache, at)
        for slot, row in rows.items():
            self.sampler.assign(slot, row.sampling, row.sample, row.prompt)
        self.sampler.ready()
        if self.decoder is None:
            drawn = self._draw(self.model.head(hidden[at]), list(rows))
        else:
            drawn = self._draw(self.model.lm_head(hidden[at]).float(), list(rows), self.model.cap)
        self._take(list(rows), *drawn)

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """The hidden state after each prompt (rows, C), and the cache that holds them."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        cache = self._new_cache(len(prompts), max(lengths))
        hidden = self.model.hidden(tokens.to(self.engine.device), cache)
        cache.advance(lengths)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return hidden[torch.arange(len(prompts), device=hidden.device), last], cache
