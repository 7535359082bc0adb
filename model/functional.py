"""The elementwise parts of the model. Eagerly each takes few passes over memory, and in training is one autograd step
(a tenth of a training step on CPUs); a compiler is given the plain formula, which it fuses itself."""

import torch
from torch import Tensor
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
        return _turn(grad, *ctx.saved_tensors, -1), None, None


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
