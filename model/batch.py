"""Rows of text that are generated side by side: one cache with a slot for each, and the queue of those that wait."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from model.decoder import Decoder
from model.kvcache import KVCache
from model.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from model.engine import Engine

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
    finish: Finish | None = None


class Batch:
    """The rows of one decode: a cache with a slot for each, and the queue of those that wait for one."""

    # Inference mode is entered call by call: held open in a generator, it would leak into whoever reads from it.
    @torch.inference_mode()
    def __init__(self, engine: "Engine", rows: list[Row], logprobs: bool, decoder: Decoder | None) -> None:
        self.engine, self.model, self.decoder, self.logprobs = engine, engine.model, decoder, logprobs
        self.queue = deque(sorted(rows, key=lambda row: -len(row.prompt)))  # stable: samples of a prompt stay together
        self.slots: list[Row | None] = [None] * min(engine.rows, len(rows))
        self.finished: list[Row] = []
        self.length = max(len(row.prompt) + row.room for row in rows)
        self.cache = self._new_cache(len(self.slots), self.length)
        vocab_size = self.model.lm_head.weight.size(0)
        self.sampler = Sampler(len(self.slots), max(row.room for row in rows), vocab_size, engine.device)
        self._admit()

    @property
    def active(self) -> bool:
        return any(row is not None for row in self.slots)

    def take_finished(self) -> list[Row]:
        taken, self.finished = self.finished, []
        return taken

    def _new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache(self.model.config, rows, length, self.engine.device, self.model.compute_dtype)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row in a slot; then free slots are filled, or given up when nobody waits for them."""
        feed = torch.tensor([row.tokens[-1] if row else 0 for row in self.slots], device=self.engine.device)
        if self.decoder is not None:
            hidden = self.decoder.hidden(feed, self.cache)
        else:
            hidden = self.model.hidden(feed[:, None], self.cache)[:, 0]
        self.cache.advance([int(row is not None) for row in self.slots])
        self._choose(hidden, list(range(len(self.slots))))
        free = self._release()
        if self.queue and free * 8 >= len(self.slots):
            self._admit()
        elif not self.queue and free * 2 >= len(self.slots) and self.active:
            kept = [slot for slot, row in enumerate(self.slots) if row is not None]
            self.cache.select(kept)
            self.sampler.select(kept)
            self.slots = [self.slots[slot] for slot in kept]

    def _choose(self, hidden: Tensor, slots: list[int]) -> None:
        """The rows in these slots take their next token, each drawn by what its line of hidden (N, C) says."""
        rows = [self.slots[slot] for slot in slots]
        if self.decoder is None:
            logits, cap = self.model.head(hidden), None
        else:
            logits, cap = self.decoder.logits(hidden), self.model.cap
        if self.logprobs and cap is not None:  # probabilities need all of them
            logits, cap = cap(logits), None
        tokens = self.sampler.draw(logits, slots, cap)
        chosen = [self.engine.take(row, token) if row else 0 for row, token in zip(rows, tokens.tolist())]
        self.sampler.saw(slots, chosen)
        if self.logprobs:
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

    def _admit(self) -> None:
        """Read waiting prompts, each once however many samples it has, and give their rows a slot and a first token."""
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
        self._choose(hidden[at], list(rows))

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
