"""A static key-value cache whose rows hold sequences of different lengths."""

import torch
from torch import Tensor
from torch.nn import functional as F

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
        shape = (config.depth, rows, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)
        self.embeddings = torch.zeros(rows, config.width, device=device, dtype=dtype)  # of the last token, for smear
        self.extent = 0  # the longest row, known to the host
        self.at = self.lengths[:, None]

    def positions(self, count: int) -> Tensor:
        """(rows, count): where the next `count` tokens of each row will stand."""
        self.at = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        return self.at

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Write k, v (rows, T, H_kv, D) at the positions asked for last; attention of q (rows, T, H, D) over its row."""
        row = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        self.keys[layer][row, :, self.at] = k
        self.values[layer][row, :, self.at] = v
        held = self.extent + q.size(1)
        keys, values = self.keys[layer, :, :, :held], self.values[layer, :, :, :held]
        distance = self.at[:, :, None] - torch.arange(held, device=q.device)  # (rows, T, held)
        mask = ((distance >= 0) & (distance < window))[:, None]
        grouped = q.size(2) != k.size(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped)
        return y.transpose(1, 2)

    def previous(self, x: Tensor) -> Tensor:
        """The embedding before each of x (rows, T, C); zero at the start of a row. Only smear needs it."""
        before = torch.cat([self.embeddings[:, None], x[:, :-1]], dim=1)
        self.pending = x
        return before

    def advance(self, counts: Tensor | int) -> None:
        """The first counts[row] tokens of the last call are part of the row now."""
        counts = torch.as_tensor(counts, device=self.lengths.device).expand_as(self.lengths)
        if self.pending is not None:
            last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.embeddings.size(1))
            moved = self.pending.gather(1, last)[:, 0]
            self.embeddings = torch.where(counts[:, None] > 0, moved, self.embeddings)
        self.lengths = self.lengths + counts
        self.extent = int(self.lengths.max())

    pending: Tensor | None = None  # the embeddings of the last call, until advance() says which are real
