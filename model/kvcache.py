"""A static key-value cache whose rows hold sequences of different lengths."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import attend
from model.config import GPTConfig


class KVCache:
    """Keys and values of all layers for `rows` sequences of at most `length` tokens.

    GPT.hidden(tokens, cache) asks for positions(T), lets each layer write and read through attend, and leaves the
    lengths alone: after it the caller says with advance() how many of the T tokens of each row are real. Padding at the
    right of a row is written too, but never read, and overwritten by what comes next.
    """

    def __init__(
        self, config: GPTConfig, rows: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        # Zeros, not whatever memory holds: a masked NaN would still be a NaN.
        self.pairs = torch.zeros(
            (2, config.depth, rows, config.kv_heads, length, config.head_dim), device=device, dtype=dtype
        )
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)
        self.embeddings = torch.zeros(rows, config.width, device=device, dtype=dtype)  # of the last token, for smear
        self.grouped = config.heads != config.kv_heads
        self.held = [0] * rows  # lengths again, known without asking the device
        self.pending: Tensor | None = None  # the embeddings of the last call, until advance() says which are real
        self.positions(1)

    @property
    def extent(self) -> int:
        """The length of the longest row."""
        return max(self.held)

    def positions(self, count: int) -> Tensor:
        """(rows, count): where the next `count` tokens of each row will stand; `together`, if that is one place."""
        self.at = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        start, stop = self.extent, self.extent + count
        level = min(self.held) == start and stop <= self.pairs.size(4)
        self.together = slice(start, stop) if level else None
        self.row = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        self.masks: dict[int, Tensor] = {}
        return self.at

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Write k, v (rows, T, H_kv, D) where positions() said last; attention of q (rows, T, H, D) over its row."""
        keys, values = self.pairs[0, layer], self.pairs[1, layer]
        if self.together is not None:
            keys[:, :, self.together], values[:, :, self.together] = k.transpose(1, 2), v.transpose(1, 2)
        else:
            keys[self.row, :, self.at], values[self.row, :, self.at] = k, v
        if self.extent == 0:  # nothing but what comes now
            return attend(q, k, v, window)
        first, held, mask = 0, self.extent + q.size(1), None
        if self.together is not None and q.size(1) == 1:  # what the window shows is one piece
            first = max(0, held - window)
        else:
            mask = self._mask(held, window, q.dtype)
        keys, values = keys[:, :, first:held], values[:, :, first:held]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=self.grouped)
        return y.transpose(1, 2)

    def _mask(self, held: int, window: int, dtype: torch.dtype) -> Tensor:
        """(rows, 1, T, held), 0 where a query may look and -inf elsewhere; one for all layers with the same window."""
        if window not in self.masks:
            distance = self.at[:, :, None] - torch.arange(held, device=self.at.device)
            seen = (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.at.device).masked_fill_(~seen, -torch.inf)
            self.masks[window] = mask[:, None]
        return self.masks[window]

    def previous(self, x: Tensor) -> Tensor:
        """The embedding before each of x (rows, T, C); zero at the start of a row. Only smear needs it."""
        before = torch.cat([self.embeddings[:, None], x[:, :-1]], dim=1)
        self.pending = x
        return before

    def advance(self, counts: list[int] | int) -> None:
        """The first counts[row] tokens of the last call (of every row, if one number) are part of the row now."""
        counts = counts if isinstance(counts, list) else [counts] * len(self.held)
        added = torch.tensor(counts, device=self.lengths.device)
        if self.pending is not None:
            last = (added - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.embeddings.size(1))
            moved = self.pending.gather(1, last)[:, 0]
            self.embeddings = torch.where(added[:, None] > 0, moved, self.embeddings)
        self.lengths = self.lengths + added
        self.held = [old + new for old, new in zip(self.held, counts)]

    def adopt(self, rows: list[int], other: "KVCache", others: list[int]) -> None:
        """Row rows[i] starts again as a copy of row others[i] of another cache."""
        to, source = (torch.tensor(places, device=self.lengths.device) for places in (rows, others))
        self.pairs[:, :, to, :, : other.extent] = other.pairs[:, :, source, :, : other.extent]
        self.lengths[to], self.embeddings[to] = other.lengths[source], other.embeddings[source]
        for row, place in zip(rows, others):
            self.held[row] = other.held[place]

    def clear(self, row: int) -> None:
        """Forget a row, so that it does not count for the extent."""
        self.lengths[row] = self.held[row] = 0

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        places = torch.tensor(rows, device=self.lengths.device)
        self.pairs = self.pairs[:, :, places]
        self.lengths, self.embeddings = self.lengths[places], self.embeddings[places]
        self.held = [self.held[row] for row in rows]
