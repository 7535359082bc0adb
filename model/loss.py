"""Cross-entropy fused with the softcapped head, in chunks: the logits of all tokens never stand at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -1
CHUNK_LOGITS = 1 << 23  # logits held at once: 32 MiB in float32


def softcap_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Sum of -log softmax(softcap * tanh(hidden weight^T / softcap))[target] over targets other than -1.

    hidden: (..., C), weight: (V, C), targets: (...) int64. A float32 scalar, differentiable in hidden and weight.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets, softcap).sum()
    return _Fused.apply(hidden.flatten(0, -2), weight, targets.flatten(), softcap)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """The same for each target, in the shape of targets, float32; 0 where the target is -1."""
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    losses = torch.empty(len(flat), device=hidden.device, dtype=torch.float32)
    for start, stop in _chunks(len(flat), len(weight)):
        losses[start:stop] = _Chunk(flat[start:stop], weight.to(hidden.dtype), wanted[start:stop], softcap).losses
    return losses.view(targets.shape)


def _chunks(rows: int, vocab_size: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Chunk:
    """The head over one chunk of N rows; keeps what its gradient needs.

    No maximum is subtracted before exp: the cap keeps every logit within +-softcap, and exp(15) * V is far from
    float32's largest number.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> None:
        self.kept = targets != IGNORE
        self.index = targets.clamp(min=0)[:, None]
        self.tanh = ((hidden / softcap) @ weight.T).float().tanh_()  # (N, V)
        self.exp = torch.mul(self.tanh, softcap).exp_()
        self.total = self.exp.sum(-1)  # (N,)
        at_target = self.tanh.gather(1, self.index)[:, 0] * softcap
        self.losses = torch.where(self.kept, self.total.log() - at_target, 0.0)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """d(sum of losses) / d(logits before the cap), as (N, V) times (N, 1): what scales whole rows is applied
        later, where a row is C numbers instead of V."""
        scale = torch.where(self.kept, 1.0 / self.total, 0.0)
        self.exp.scatter_add_(1, self.index, -self.total[:, None])
        return self.exp.addcmul_(self.exp, self.tanh.square_(), value=-1), scale[:, None]


class _Fused(torch.autograd.Function):
    """Gradients are made in the forward pass, while the chunk's logits are there, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        head = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start, stop in _chunks(len(hidden), len(weight)):
            rows = hidden[start:stop]
            chunk = _Chunk(rows, head, targets[start:stop], softcap)
            total += chunk.losses.sum()
            d_logits, scale = chunk.gradient()
            d_logits, scale = d_logits.to(head.dtype), scale.to(head.dtype)
            torch.mul(d_logits @ head, scale, out=d_hidden[start:stop])
            if head.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.T, rows * scale)
            else:
                d_weight += d_logits.T @ (rows * scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad.to(d_hidden.dtype)), d_weight.mul_(grad), None, None
