"""Causal attention by each backend that this device has: forward and backward, over the whole context and in windows.

FLOPs are those of the query-key pairs that are seen: 4 * head_dim a pair and head forward, 10 backward (Dao 2023,
arXiv 2307.08691, section 4.1). Masked work that a backend does anyway counts as time alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians

if TYPE_CHECKING:
    import torch


FLOPS_PER_PAIR = 14
# rows, context, heads, head_dim, window: d4 on CPUs, d20 on GPUs
SHAPES = {"cpu": (8, 512, 2, 128, 128), "cuda": (16, 2048, 10, 128, 512)}
TINY = (2, 16, 2, 16, 4)


def measure(bench: Bench) -> Result:
    from model.precision import resolve_dtype

    rows, context, heads, head_dim, short = (
        TINY if bench.settings.tiny else SHAPES.get(bench.device.type, SHAPES["cpu"])
    )
    dtype = resolve_dtype("auto", bench.device)
    shape = (rows, context, heads, head_dim)
    cases, pairs = {}, {}
    for window in (context, short):
        for backend in backends(bench.device):
            name = f"{backend} {'full' if window == context else f'window {window}'}"
            cases[name] = _pass(shape, window, backend, bench.device, dtype)
            pairs[name] = rows * heads * sum(min(position + 1, window) for position in range(context))
    seconds = medians(in_turns(cases, bench.settings.repeats, bench.device))
    return {
        name: {"ms": s * 1e3, "tflop_s": FLOPS_PER_PAIR * head_dim * pairs[name] / s / 1e12, "shape": list(shape)}
        for name, s in seconds.items()
    }


def backends(device: "torch.device") -> list[str]:
    """On CPUs flex is left out: its code there is for tests."""
    from model.attention import choose_backend, has_varlen

    if device.type != "cuda":
        return ["sdpa", "blocked"]
    import torch

    choose_backend(device, torch.bfloat16, [1], 1)  # activates the newest kernels, as training does
    return ["sdpa", "flex", "varlen"] if has_varlen() else ["sdpa", "flex"]


def _pass(
    shape: tuple[int, int, int, int], window: int, backend: str, device: "torch.device", dtype: "torch.dtype"
) -> Callable[[], object]:
    import torch

    from model.attention import attend

    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)
    return lambda: torch.autograd.grad(attend(q, k, v, window, None, backend), (q, k, v), gradient)
