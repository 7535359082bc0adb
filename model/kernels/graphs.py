"""Steps of decoding replayed as CUDA graphs: on a GPU, launching a step's kernels takes longer than running them.

A graph repeats the same kernels on the same memory. So everything that a step reads and writes stays where it is, and
what differs from step to step (the token of each row, and its position) is a tensor. The number of rows and the number
of cached positions are rounded up to a few sizes, each with its own graph.
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

Drawn = tuple[Tensor, Tensor | None]  # the rows' next tokens (rows,) and, if asked for, logits (rows, vocab)

WARM = 2  # calls before one is captured: libraries initialise themselves in their first
SPANS = 4  # sizes of a span for each doubling of it
SMALLEST_SPAN = 64  # tokens
MOST = 256  # graphs kept; without a limit, changing settings with each message would make ever more
_CAPTURING = threading.Lock()  # torch allows one capture at a time in a process


class FixedCache(KVCache):
    """A cache for decoding alone: shapes and memory of a step do not depend on what the rows hold.

    Each step reads the first `span` positions of every row and masks those that the row does not have; see aim().
    """

    def __init__(
        self, config: ResolvedConfig, rows: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__(config, rows, length, device, dtype)
        self.whole = self.pairs, self.embeddings, torch.arange(rows, device=device)[:, None]
        self.places = torch.zeros(rows, dtype=torch.long, device=device)  # position of each row's next token
        self.together, self.span = False, 0

    def restart(self, rows: int) -> None:
        """Start with `rows` empty rows."""
        pairs, embeddings, numbers = self.whole
        self.pairs, self.embeddings, self.row = pairs[:, :rows], embeddings[:rows], numbers[:rows]
        self.lengths = [-1] * rows

    def aim(self) -> None:
        """Set the span that the next step needs."""
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
        """Start an empty batch of `rows` rows. sampling: of slots without a row."""
        self.cache.restart(rows)
        self.cache.pairs.zero_()  # masked values are multiplied by zero, and zero times NaN is NaN
        self.sampler.restart([sampling] * rows)

    def step(self, tokens: list[int], step: Callable[[Tensor], Drawn], options: Hashable) -> Drawn:
        """step(the rows' tokens (rows,) int64), which must do nothing but call kernels, or its replay.

        Results are overwritten by later steps. options: what else decides which kernels are called.
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
        """Capture a graph of the call if it is time to; return True if there is one."""
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
            warnings.warn(f"decoding continues without CUDA graphs, more slowly: {error}", stacklevel=2)
            self.captures = False
        return self.captures


def capture(call: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call's kernels, which have not run yet, and what the call returns: memory that a replay fills.

    pool: memory of another graph to share. A replay of either then overwrites the results of the other.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with _CAPTURING, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch.cuda.set_stream(stream)  # torch leaves another one set where a capture fails
    return graph, result


def span_for(places: int) -> int:
    """The smallest size of a span that holds `places` positions."""
    unit = max(SMALLEST_SPAN, 2 ** ((places - 1).bit_length() - 1) // SPANS)
    return -(-places // unit) * unit


def rows_for(rows: int) -> int:
    """`rows` rounded up to a number that steps are made for: a power of two."""
    return 1 << (rows - 1).bit_length()
