"""Steps of decoding replayed as CUDA graphs: on a GPU, launching a step's kernels takes longer than running them.

A graph repeats the same kernels on the same memory. So all that a step reads and writes stays where it is, and what
differs from step to step (the token of each row, and where it stands) is a tensor. Rows, and the places that are looked
at, come in few sizes, each with a graph of its own.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import ResolvedConfig
from model.decoding.kvcache import KVCache
from model.decoding.sampling import Sampler, Sampling

Drawn = tuple[Tensor, Tensor | None]  # the rows' next tokens (rows,) and, where they are wanted, logits (rows, vocab)

WARM = 2  # calls that run as they are before one is captured: libraries set themselves up in their first
SPANS = 4  # sizes of a span for each doubling of it
SMALLEST_SPAN = 64  # tokens
MOST = 256  # graphs that are kept: whoever changes settings with each message makes ever more of them
_CAPTURING = threading.Lock()  # torch allows one capture at a time in a process


class FixedCache(KVCache):
    """A cache for decoding alone: a step's shapes and memory do not depend on what the rows hold.

    It looks at the first `span` places of every row and masks what is not the row's; see aim().
    """

    def __init__(
        self, config: ResolvedConfig, rows: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__(config, rows, length, device, dtype)
        self.whole = self.pairs, self.embeddings, torch.arange(rows, device=device)[:, None]
        self.places = torch.zeros(rows, dtype=torch.long, device=device)  # where the next token of a row will stand
        self.together, self.span = False, 0

    def restart(self, rows: int) -> None:
        """There are `rows` rows now, all empty."""
        pairs, embeddings, numbers = self.whole
        self.pairs, self.embeddings, self.row = pairs[:, :rows], embeddings[:rows], numbers[:rows]
        self.lengths = [-1] * rows

    def aim(self) -> None:
        """Let the next step look as far as it must."""
        self.span = min(span_for(self.extent + 1), self.pairs.size(3))

    def begin(self, count: int) -> Tensor:
        assert count == 1, "reading a prompt is for other caches"
        self.masks = {}
        self.start = self.held = self.span
        self.keys, self.values = self._layers(0, self.span)
        self.at = self.positions(1)
        return self.at

    def positions(self, count: int) -> Tensor:
        return self.places[: len(self.lengths), None]

    def previous(self, x: Tensor) -> Tensor:
        before = self.embeddings[:, None].clone()
        self.embeddings.copy_(x[:, 0])
        return before

    def select(self, rows: list[int]) -> None:
        places, count, held = torch.tensor(rows, device=self.device), len(rows), self.extent
        self.pairs[:, :count, :, :held] = self.pairs[:, places, :, :held]
        self.embeddings[:count] = self.embeddings[places]
        lengths = [self.lengths[row] for row in rows]
        self.restart(count)
        self.lengths = lengths


class Replay:
    """What steps of decoding work on, kept from batch to batch together with the graphs that were made of it."""

    def __init__(
        self, config: ResolvedConfig, rows: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.rows, self.length = rows, length
        self.cache = FixedCache(config, rows, length, device, dtype)
        self.sampler = Sampler(rows, length, config.vocab_size, device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.steps: dict[int, Any] = {}  # by rows: what else a graph's memory belongs to, kept as long
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Drawn]] = {}
        self.captures = True

    def restart(self, rows: int, sampling: Sampling) -> None:
        """An empty batch of `rows` rows; sampling: of rows that nobody has."""
        self.cache.restart(rows)
        self.cache.pairs.zero_()  # what is masked is multiplied by zero, which is no cure for a NaN
        self.sampler.restart([sampling] * rows)

    def step(self, tokens: list[int], step: Callable[[Tensor], Drawn], options: Hashable) -> Drawn:
        """step(the rows' tokens (rows,) int64), which does nothing but call kernels, or its replay.

        Results are overwritten by later steps. options: whatever of the caller decides which kernels are called.
        """
        self.cache.aim()
        rows = len(tokens)
        feed = self.tokens[:rows]
        feed.copy_(torch.tensor(tokens))
        self.cache.places[:rows].copy_(torch.tensor([max(0, length) for length in self.cache.lengths]))
        key = rows, self.cache.span, self.sampler.plan, options
        if key not in self.graphs and not self._capture(key, partial(step, feed)):
            return step(feed)
        graph, result = self.graphs[key]
        graph.replay()
        return result

    def _capture(self, key: Hashable, call: Callable[[], Drawn]) -> bool:
        """Whether there is a graph of the call now."""
        self.calls[key] += 1
        if not self.captures or self.calls[key] <= WARM:
            return False
        if len(self.graphs) >= MOST:
            self.graphs.clear()
            self.calls.clear()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        try:
            self.graphs[key] = capture(call, pool)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without CUDA graphs, more slowly: {error}", stacklevel=2)
            self.captures = False
        return self.captures


def capture(call: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call's kernels, which have not run yet, and what the call returns: memory that a replay fills.

    pool: of a graph that shares its memory, so that a replay of either overwrites what the other made.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with _CAPTURING, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch.cuda.set_stream(stream)  # which torch leaves behind where a capture fails
    return graph, result


def span_for(places: int) -> int:
    """The smallest size of a span that holds so many places."""
    unit = max(SMALLEST_SPAN, 2 ** ((places - 1).bit_length() - 1) // SPANS)
    return -(-places // unit) * unit


def rows_for(rows: int) -> int:
    """The smallest number of rows that steps are made for: a power of two."""
    return 1 << (rows - 1).bit_length()
