"""Cross-entropy with the softcapped head: fused and chunked, the same compiled (on GPUs), and the plain way.

Time: forward and backward, in turns within this process. Memory: on GPUs what the allocator holds at most beyond the
inputs; on CPUs the peak of the resident set beyond what it was before, each variant in a process of its own, where a
tiny call has loaded the libraries.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians
from pipeline.plan.keys import ROOT

if TYPE_CHECKING:
    import torch


# tokens, width, vocabulary
SIZES = {"cpu": [(4096, 256, 8192), (4096, 512, 65536)], "cuda": [(32768, 768, 32768), (32768, 1280, 65536)]}
TINY = [(64, 16, 128)]
RESET_PEAK = Path("/proc/self/clear_refs")
VARIANTS = ("fused", "fused compiled", "plain")


def measure(bench: Bench) -> Result:
    from model.precision import resolve_dtype
    from pipeline.bench.compiling import why_not

    compiles = bench.device.type == "cuda" and bench.settings.compile is not False and why_not(bench.device) is None
    variants = [name for name in VARIANTS if compiles or name != "fused compiled"]
    dtype = resolve_dtype("auto", bench.device)
    result: Result = {}
    for size in TINY if bench.settings.tiny else SIZES.get(bench.device.type, SIZES["cpu"]):
        cases = {name: run_of(name, size, bench.device, dtype) for name in variants}
        seconds = medians(in_turns(cases, bench.settings.repeats, bench.device))
        del cases
        for name in variants:
            extra = gpu_extra(name, size, bench.device, dtype) if bench.device.type == "cuda" else cpu_extra(name, size)
            flops = 6 * size[0] * size[1] * size[2]
            values = {"ms": seconds[name] * 1e3, "tflop_s": flops / seconds[name] / 1e12}
            if extra is not None:
                values["peak_extra_mb"] = extra / 1e6
            result[f"{name} {size[0]} x {size[1]} x {size[2]}"] = values
    return result


def run_of(name: str, size: tuple[int, int, int], device: "torch.device", dtype: "torch.dtype") -> Callable[[], object]:
    """A call: loss and gradients of hidden (tokens, width) and weight (vocabulary, width), which is float32."""
    import torch
    from torch.nn import functional as F

    from model.gpt import SOFTCAP
    from model.loss import softcap_cross_entropy

    tokens, width, vocab = size
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def plain() -> "torch.Tensor":
        logits = SOFTCAP * torch.tanh(F.linear(hidden, weight.to(dtype)).float() / SOFTCAP)
        return F.cross_entropy(logits, targets, reduction="sum")

    def fused() -> "torch.Tensor":
        return softcap_cross_entropy(hidden, weight, targets, SOFTCAP, compiled=name == "fused compiled")

    loss = plain if name == "plain" else fused
    return lambda: torch.autograd.grad(loss(), (hidden, weight))


def gpu_extra(name: str, size: tuple[int, int, int], device: "torch.device", dtype: "torch.dtype") -> int:
    """Bytes."""
    import torch

    call = run_of(name, size, device, dtype)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_extra(name: str, size: tuple[int, int, int]) -> int | None:
    """Bytes, measured by `python -m pipeline.bench.cross_entropy` in a process of its own; None but on Linux."""
    if not RESET_PEAK.exists():
        return None
    command = [sys.executable, "-m", "pipeline.bench.cross_entropy", json.dumps([name, size])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _own_extra(name: str, size: tuple[int, int, int]) -> int:
    import torch

    cpu = torch.device("cpu")
    run_of(name, (32, 16, 64), cpu, torch.float32)()
    call = run_of(name, size, cpu, torch.float32)
    before = _reset_peak()
    call()
    return _peak() - before


def _reset_peak() -> int:
    """Let the peak start again from what is resident now; returns that, in bytes."""
    RESET_PEAK.write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    print(_own_extra(*json.loads(sys.argv[1])))
