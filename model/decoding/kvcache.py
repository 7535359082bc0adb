"""A static key-value cache whose rows hold sequences of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import attend
from model.config import ResolvedConfig

MANY = 128  # rows * heads from which batched GEMMs of one query each are faster on CPUs, measured


class KVCache:
    """Keys and values of all layers for `rows` sequences of at most `length` tokens.

    GPT.hidden(tokens, cache) calls begin(T) and lets each layer write and read through attend. Afterwards its caller
    passes to advance() how many of the T tokens of each row are real. Padding at the right of a row is written too, but
    never read, and overwritten by the next tokens.
    """

    def __init__(
        self, config: ResolvedConfig, rows: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        # Zeros, not whatever memory holds: a masked NaN would still be a NaN.
        shape = 2 * config.depth, rows, config.kv_heads, length, config.head_dim
        self.pairs = torch.zeros(shape, device=device, dtype=dtype)  # keys of all layers, then values of all layers
        self.embeddings = torch.zeros(rows, config.width, device=device, dtype=dtype)  # of the last token, for smear
        self.grouped = config.heads != config.kv_heads
        self.lengths = [0] * rows  # known without asking the device; -1: of no row, see clear()
        self.pending: Tensor | None = None  # the embeddings of the last call, until advance() says which are real

    @property
    def device(self) -> torch.device:
        return self.pairs.device

    @property
    def extent(self) -> int:
        """The length of the longest row."""
        return max(0, *self.lengths)

    def begin(self, count: int) -> slice | Tensor:
        """Positions of the next `count` tokens of each row: a slice if all rows have the same, which is cheap to write
        to, (rows, count) otherwise."""
        self.masks: dict[int, Tensor] = {}
        self.start = self.extent
        self.held = self.start + count
        # Views of all layers are made at once: with one token per row, making them takes longer than using them.
        self.keys, self.values = self._layers(0, self.held)
        self.together = {self.start, -1}.issuperset(self.lengths)
        if self.together:
            self.new_keys, self.new_values = self._layers(self.start, count)
            return slice(self.start, self.held)
        self.row, self.at = torch.arange(len(self.lengths), device=self.device)[:, None], self.positions(count)
        return self.at

    def _layers(self, start: int, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of each layer at `count` positions from `start`, (rows, H_kv, count, D)."""
        both = self.pairs.narrow(3, start, count).unbind()
        return both[: len(both) // 2], both[len(both) // 2 :]

    def positions(self, count: int) -> Tensor:
        """(rows, count): positions of the next `count` tokens of each row."""
        starts = torch.tensor([max(0, length) for length in self.lengths], device=self.device)
        return starts[:, None] + torch.arange(count, device=self.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Write k, v (rows, T, H_kv, D) where begin() said; attention of q (rows, T, H, D) over its row."""
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.start > 0:
            return self.attend_on(layer, *heads, window).transpose(1, 2)
        self._write(layer, *heads[1:])
        return attend(q, k, v, window)  # the rows were empty: these tokens see only each other

    def attend_on(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """The same with heads before tokens, (rows, H, T, D), for rows that are not empty."""
        self._write(layer, k, v)
        keys, values, mask = self.keys[layer], self.values[layer], None
        if not (self.together and q.size(2) == 1):
            mask = self._mask(q.size(2), window, q.dtype)
        elif window < self.held:  # what the window shows is contiguous
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        if q.size(2) == 1 and not self.grouped and q.device.type == "cpu" and q.size(0) * q.size(1) >= MANY:
            return attend_once(q, keys, values, mask)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=self.grouped)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.together:
            self.new_keys[layer].copy_(k)
            self.new_values[layer].copy_(v)
        else:
            self.keys[layer][self.row, :, self.at] = k.transpose(1, 2)
            self.values[layer][self.row, :, self.at] = v.transpose(1, 2)

    def _mask(self, count: int, window: int, dtype: torch.dtype) -> Tensor:
        """(rows, 1, count, held): 0 where a query may look, -inf elsewhere. Layers with the same window share one."""
        if window not in self.masks:
            distance = self.positions(count)[:, :, None] - torch.arange(self.held, device=self.device)
            seen = (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            self.masks[window] = mask[:, None]
        return self.masks[window]

    def previous(self, x: Tensor) -> Tensor:
        """The embedding before each of x (rows, T, C); zero at the start of a row. Only smear needs it."""
        before = torch.cat([self.embeddings[:, None], x[:, :-1]], dim=1)
        self.pending = x
        return before

    def advance(self, counts: list[int] | int) -> None:
        """Count the first counts[row] tokens of the last call (of every row, if one number) as part of the row."""
        counts = counts if isinstance(counts, list) else [counts] * len(self.lengths)
        if self.pending is not None:
            added = torch.tensor(counts, device=self.device)
            last = (added - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.embeddings.size(1))
            moved = self.pending.gather(1, last)[:, 0]
            self.embeddings = torch.where(added[:, None] > 0, moved, self.embeddings)
        self.lengths = [old + new for old, new in zip(self.lengths, counts)]

    def adopt(self, rows: list[int], other: "KVCache", others: list[int]) -> None:
        """Row rows[i] starts again as a copy of row others[i] of another cache."""
        to, source = (torch.tensor(places, device=self.device) for places in (rows, others))
        self.pairs[:, to, :, : other.extent] = other.pairs[:, source, :, : other.extent]
        self.embeddings[to] = other.embeddings[source]
        for row, place in zip(rows, others):
            self.lengths[row] = other.lengths[place]

    def clear(self, row: int) -> None:
        """Forget a row: it is empty until adopt() fills it again."""
        self.lengths[row] = -1

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        places = torch.tensor(rows, device=self.device)
        self.pairs, self.embeddings = self.pairs[:, places], self.embeddings[places]
        self.lengths = [self.lengths[row] for row in rows]


def attend_once(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention of one query: q (rows, H, 1, D), keys and values (rows, H, L, D), mask
    (rows, 1, 1, L)."""
    scores = torch.bmm((q * q.size(-1) ** -0.5).flatten(0, 1), keys.flatten(0, 1).mT)
    if mask is not None:
        scores.view(*q.shape[:2], 1, -1).add_(mask)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(q.shape)
