"""Attention on CPUs: block by block of queries, each against the keys that it can see and no others.

torch's own kernel makes scores of all keys when a window hides most of them, and makes them once more in the backward
pass. Here they are kept, at most heads * context * min(context, window) numbers a row and layer: for short contexts.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """As model.attention.attend: q (B, T, H, D), k and v (B, T, H_kv, D), documents (B, T) -> (B, T, H, D)."""
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    batch, _, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * H, T, D)
    if documents is not None:
        documents = documents.repeat_interleave(heads, dim=0)
    return _Blocked.apply(q, k, v, window, documents).unflatten(0, (batch, heads)).transpose(1, 2)


def _blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that at least one query of each sees."""
    found = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        found.append((slice(start, stop), slice(max(0, start - window + 1), stop)))
    return found


class _Blocked(torch.autograd.Function):
    """q, k, v: (N, T, D) of N rows and heads."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
        y, kept = torch.empty_like(q), []
        for queries, keys in _blocks(q.size(1), window):
            hidden = _hidden(queries.start, queries.stop, keys.start, window, q.dtype)
            scores = torch.baddbmm(hidden, q[:, queries], k[:, keys].mT, alpha=q.size(2) ** -0.5)
            if documents is not None:
                scores.masked_fill_(documents[:, queries, None] != documents[:, None, keys], -math.inf)
            weights = torch.softmax(scores, dim=-1)
            y[:, queries] = torch.bmm(weights, v[:, keys])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, y, *kept)
        ctx.window = window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, y, *kept = ctx.saved_tensors
        d_q, d_k, d_v, scale = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), q.size(2) ** -0.5
        along = (grad * y).sum(-1, keepdim=True)
        for (queries, keys), weights in zip(_blocks(q.size(1), ctx.window), kept):
            here = grad[:, queries]
            d_v[:, keys].baddbmm_(weights.mT, here)
            d_scores = torch.bmm(here, v[:, keys].mT).sub_(along[:, queries]).mul_(weights).mul_(scale)
            d_q[:, queries] = torch.bmm(d_scores, k[:, keys])
            d_k[:, keys].baddbmm_(d_scores.mT, q[:, queries])
        return d_q, d_k, d_v, None, None


def _hidden(start: int, stop: int, first_key: int, window: int, dtype: torch.dtype) -> Tensor:
    """(queries, keys): 0 where the query sees the key, -inf elsewhere."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(first_key, stop)
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_((distance < 0) | (distance >= window), -math.inf)
