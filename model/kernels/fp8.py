"""GEMMs in 8-bit floating point with one scale per tensor (Micikevicius et al. 2022, arXiv 2209.05433).

Activations and weights as e4m3, gradients as e5m2. GPUs without FP8 hardware and CPUs emulate it: the same numbers up
to the order of sums, but slower.
"""

import torch
from torch import Tensor

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # that the hardware needs of both sides of a matrix


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, and the float32 scale that brings its largest number to the format's largest."""
    top = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / top).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-top, top).to(dtype), scale  # e4m3 has no infinity: larger numbers become NaN


def multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool) -> Tensor:
    """a (M, K) @ b (N, K)^T, both quantised and laid out row by row. fast: sum in fewer bits where the GPU can."""
    return torch._scaled_mm(a[0], b[0].t(), a[1], b[1], out_dtype=dtype, use_fast_accum=fast and a[0].is_cuda)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        eight_x, eight_w = quantise(x, FORWARD), quantise(weight, FORWARD)
        ctx.save_for_backward(*eight_x, *eight_w)
        return multiply(eight_x, eight_w, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        eight, scale = quantise(grad, BACKWARD)
        d_x = multiply((eight, scale), (weight.t().contiguous(), weight_scale), grad.dtype, fast=False)
        d_weight = multiply((eight.t().contiguous(), scale), (x.t().contiguous(), x_scale), grad.dtype, fast=False)
        return d_x, d_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight (N, K)^T, both of one 16- or 32-bit dtype; so are the result and the gradients."""
    return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def fits(weight: Tensor) -> bool:
    return all(size % MULTIPLE == 0 for size in weight.shape)


def has_units(device: torch.device) -> bool:
    """Return True if the device has FP8 hardware: from Ada and Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
