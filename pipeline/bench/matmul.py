"""The best rate that square matmuls reach here: the ceiling of everything else. Random numbers, not zeros."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns

if TYPE_CHECKING:
    import torch


SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192, 16384)}
FP8_SINCE = (8, 9)  # compute capability


def measure(bench: Bench) -> Result:
    """By dtype: the best and the median rate over rounds of the best size."""
    import torch

    sizes = (64,) if bench.settings.tiny else SIZES.get(bench.device.type, SIZES["cpu"])
    kinds = ["float32"]
    if bench.device.type == "cuda":
        kinds = ["bfloat16", "float16", "float32"]  # float32: in TF32, as training sets it
        if torch.cuda.get_device_capability(bench.device) >= FP8_SINCE:
            kinds.append("float8_e4m3fn")
    cases = {(kind, size): _multiply(kind, size, bench.device) for kind in kinds for size in sizes}
    named = {f"{kind} {size}": call for (kind, size), call in cases.items()}
    seconds = in_turns(named, bench.settings.repeats, bench.device)
    result: Result = {}
    for kind in kinds:
        rates = {size: [2 * size**3 / s for s in seconds[f"{kind} {size}"]] for size in sizes}
        size = max(rates, key=lambda n: max(rates[n]))
        median = sorted(rates[size])[len(rates[size]) // 2]
        result[kind] = {"tflop_s": max(rates[size]) / 1e12, "median_tflop_s": median / 1e12, "size": size}
    return result


def _multiply(kind: str, size: int, device: "torch.device") -> Callable[[], object]:
    import torch

    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if kind == "float8_e4m3fn":
        one = torch.ones((), device=device)
        left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        return lambda: torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    a, b = a.to(getattr(torch, kind)), b.to(getattr(torch, kind))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
