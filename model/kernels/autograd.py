"""Parts of the model with a backward pass written by hand: norm, rotary positions, squared ReLU, attention on CPUs.

Eagerly, the elementwise ones take few passes over memory and are one autograd step each in training (a tenth of a
training step on CPUs). A compiler is given the plain formula, which it fuses itself.

Attention goes block by block of queries, each against the keys that it can see and no others. torch's own kernel makes
scores of all keys when a window hides most of them, and makes them once more in the backward pass. Here they are kept,
at most heads * context * min(context, window) numbers per row and layer: for short contexts.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without parameters: x / sqrt(mean(x^2) + 1e-6)."""
    if torch.compiler.is_compiling() or (x.is_cuda and not torch.is_grad_enabled()):
        return F.rms_norm(x, (x.size(-1),), eps=EPS)
    return _Norm.apply(x) if torch.is_grad_enabled() else (x * _scale(x)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position by MINUS theta, half split: x (B, T, H, D); cos, sin (T or B x T, 1, D/2) in x's dtype."""
    if torch.compiler.is_compiling():
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2"""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu().square_()


def _scale(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + 1e-6) of the last dimension, which stays as one; at least in float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.addcmul(length.new_full((), EPS), length, length, value=1 / x.size(-1)).rsqrt_()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scale = _scale(x)
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    (x1, x2), y = x.chunk(2, dim=-1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=-sign)
    return y


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grad, positive).mul_(2)


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
