"""GEMMs of float32 on CPUs, by oneDNN where it is the faster library.

torch calls MKL, which uses AVX-512 only on Intel's processors. On others that have AVX-512, oneDNN, which is part of
torch's builds, is more than twice as fast. Numbers differ by rounding, as between processors.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WORTH = 2**20  # multiplications of a GEMM; for smaller ones, calling oneDNN costs more than it saves, measured


@functools.cache
def available() -> bool:
    """Return True if this torch has oneDNN and it is faster here than MKL."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_linear_pointwise") and hasattr(mkldnn, "_reorder_linear_weight") and not _by_intel()


def _by_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def suits(weight: Tensor, rows: int) -> bool:
    """Return True if oneDNN should multiply `rows` rows by weight (out, in); never under torch.compile."""
    right = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() * rows >= WORTH
    return right and not torch.compiler.is_compiling() and available()


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in)^T; weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As F.linear: x (..., in) @ weight (out, in)^T, of one dtype; once differentiable."""
    if not suits(weight, x.numel() // x.size(-1)):
        return F.linear(x, weight)
    return _Linear.apply(x, weight) if torch.is_grad_enabled() else onednn(x, weight)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N), without a gradient."""
    if not suits(b, len(a)):
        return torch.mm(a, b)
    if a.is_contiguous() or a.numel() <= b.numel():
        return onednn(a, b.t())
    return onednn(b.t(), a).t()  # oneDNN copies a first factor whose rows are not dense: let it be the smaller one


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N) += a (M, K) @ b (K, N), without a gradient."""
    if suits(b, len(a)):
        total += mm(a, b)
    else:
        total.addmm_(a, b)


def pack(weight: Tensor) -> Tensor:
    """A copy of weight (out, in) in oneDNN's own order, with which few rows take half the time."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = onednn(grad, weight.t())
        if ctx.needs_input_grad[1]:
            d_weight = mm(grad.flatten(0, -2).t(), x.flatten(0, -2))
        return d_x, d_weight
