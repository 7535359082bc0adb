"""Cross-entropy fused with the softcapped head, in chunks: the logits of all tokens never exist at once."""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.matmul import add_mm, mm

IGNORE = -1
HALF_SCALE = 256.0  # of float16 gradients of logits, which are within +-1: small ones keep their digits
CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}  # of one chunk; fewer do not fill a GPU, more overflow a CPU's caches


def softcap_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, compiled: bool = False
) -> Tensor:
    """Sum of -log softmax(softcap * tanh(hidden weight^T / softcap))[target] over targets other than -1.

    hidden: (..., C), weight: (V, C), targets: (...) int64. A float32 scalar, differentiable in hidden and weight once.
    compiled: let torch.compile fuse everything but GEMMs, on GPUs; CPUs are a tenth faster with torch's own kernels.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets, softcap).sum()
    return _Fused.apply(hidden.flatten(0, -2), weight, targets.flatten(), softcap, compiled)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """The loss of each target, in the shape of targets, float32; 0 where the target is -1."""
    flat, wanted, head = hidden.flatten(0, -2), targets.flatten(), weight.to(hidden.dtype)
    losses = torch.empty(len(flat), device=hidden.device, dtype=torch.float32)
    for start, stop in _chunks(flat, weight):
        losses[start:stop] = _Chunk(_logits(flat[start:stop], head, softcap), wanted[start:stop], softcap).losses()
    return losses.view(targets.shape)


def _chunks(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    rows = len(hidden)
    size = max(1, CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cpu"]) // len(weight))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, head: Tensor, softcap: float) -> Tensor:
    """The logits before the cap times 2 / softcap, (N, V), as _Chunk needs them. Scaling the hidden state means scaling
    C numbers per row instead of V."""
    return mm(hidden * (2 / softcap), head.T)


class _Chunk:
    """Losses and gradient of N rows of logits, which are overwritten.

    softcap * tanh(x / softcap) = 2 * softcap * sigmoid(2 x / softcap) - softcap, and sigmoid takes a third of tanh's
    time on CPUs. No maximum is subtracted before exp: the cap keeps every logit within +-softcap, and exp(15) * V is
    far below float32's largest number.
    """

    def __init__(self, logits: Tensor, targets: Tensor, softcap: float) -> None:
        self.softcap, self.kept = softcap, targets != IGNORE
        self.index = targets.clamp(min=0)[:, None]
        self.sigmoid = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid_()  # (N, V)
        self.exp = self._capped(self.sigmoid).exp_()
        self.total = self.exp.sum(-1)  # (N,)

    def _capped(self, sigmoid: Tensor) -> Tensor:
        """2 * softcap * sigmoid - softcap, in one pass."""
        return torch.rsub(sigmoid, -self.softcap, alpha=-2 * self.softcap)

    def losses(self) -> Tensor:
        at_target = self._capped(self.sigmoid.gather(1, self.index)[:, 0])
        return torch.where(self.kept, self.total.log() - at_target, 0.0)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """d(sum of losses) / d(logits before the cap), as (N, V) times (N, 1): factors of whole rows are applied later,
        when a row has C numbers instead of V."""
        scale = torch.where(self.kept, 4.0 / self.total, 0.0)
        self.exp.scatter_add_(1, self.index, -self.total[:, None])
        slope = self.sigmoid.addcmul_(self.sigmoid, self.sigmoid, value=-1)  # a quarter of d capped / d logit
        return self.exp.mul_(slope), scale[:, None]


def _loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of losses, and the two factors of the gradient, in the dtype of the logits."""
    chunk = _Chunk(logits, targets, softcap)
    loss = chunk.losses().sum()
    gradient, scale = chunk.gradient()
    if logits.dtype == torch.float16:  # ends at 65,504: neither exp nor its sum over the vocabulary fits
        gradient, scale = gradient.mul_(scale * HALF_SCALE), torch.full_like(scale, 1 / HALF_SCALE)
    return loss, gradient.to(logits.dtype), scale.to(logits.dtype)


@functools.cache
def _compiled_loss_and_gradient():
    return torch.compile(_loss_and_gradient, dynamic=False)


class _Fused(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits exist, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, compiled: bool) -> Tensor:
        head = weight.to(hidden.dtype)
        kernel = _compiled_loss_and_gradient() if compiled and hidden.is_cuda else _loss_and_gradient
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start, stop in _chunks(hidden, weight):
            rows = hidden[start:stop]
            loss, d_logits, scale = kernel(_logits(rows, head, softcap), targets[start:stop], softcap)
            total += loss
            torch.mul(mm(d_logits, head), scale, out=d_hidden[start:stop])
            if head.dtype == d_weight.dtype:
                add_mm(d_weight, d_logits.T, rows * scale)
            else:
                d_weight += d_logits.T @ (rows * scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad.to(d_hidden.dtype)), d_weight.mul_(grad), None, None, None
