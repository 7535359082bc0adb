"""Single operations of training: matmul, memory copies, attention and cross-entropy."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import attend, choose_backend, has_varlen
from model.gpt import SOFTCAP
from model.loss import softcap_cross_entropy
from model.precision import resolve_dtype
from pipeline.bench.jobs import compile_error
from pipeline.bench.registry import Bench, Result
from pipeline.bench.timing import in_turns, median_seconds
from pipeline.plan.keys import ROOT

ATTENTION_FLOPS = 14
FP8_SINCE = (8, 9)  # compute capability
RESET_PEAK = Path("/proc/self/clear_refs")

Size = tuple[int, int, int]


def matmul(bench: Bench) -> Result:
    """The highest rate of square matmuls on this device, by dtype: the best size's best and median round.

    Of random numbers: on zeros a GPU needs less power and runs faster.
    """
    sizes = bench.choose(tiny=(64,), cpu=(1024, 2048, 3072), cuda=(4096, 8192, 16384))
    dtypes = ["float32"]
    if bench.device.type == "cuda":
        dtypes = ["bfloat16", "float16", "float32"]  # float32: in TF32, as training sets it
        if torch.cuda.get_device_capability(bench.device) >= FP8_SINCE:
            dtypes.append("float8_e4m3fn")
    cases = {f"{dtype} {size}": _multiply(dtype, size, bench.device) for dtype in dtypes for size in sizes}
    seconds = in_turns(bench, cases)
    result: Result = {}
    for dtype in dtypes:
        rates = {size: sorted(2 * size**3 / s / 1e12 for s in seconds[f"{dtype} {size}"]) for size in sizes}
        size = max(rates, key=lambda size: rates[size][-1])
        median = rates[size][len(rates[size]) // 2]
        result[dtype] = {"tflop_s": rates[size][-1], "median_tflop_s": median, "size": size}
    return result


def _multiply(dtype: str, size: int, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    if dtype == "float8_e4m3fn":
        b, one = b.t().contiguous().t(), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def memory(bench: Bench) -> Result:
    """GB/s of copies, as bytes read plus bytes written, of buffers larger than any cache.

    On GPUs also from and to pinned host memory, as bytes moved.
    """
    size = bench.choose(tiny=1 << 16, cpu=1 << 29, cuda=1 << 32)
    source = torch.randint(0, 100, (size // 8,), device=bench.device)
    target = torch.empty_like(source)
    cases, moved = {"copy": lambda: target.copy_(source)}, {"copy": 2 * size}
    if bench.device.type == "cuda":
        host = torch.empty(size // 32, dtype=source.dtype, pin_memory=True)
        part = source[: len(host)]
        cases |= {"host to device": lambda: part.copy_(host), "device to host": lambda: host.copy_(part)}
        moved |= {"host to device": size // 4, "device to host": size // 4}
    seconds = in_turns(bench, cases)
    return {name: {"gb_s": moved[name] / min(times) / 1e9, "gb": size / 1e9} for name, times in seconds.items()}


def attention(bench: Bench) -> Result:
    """Causal attention, forward and backward, by each backend of this device: over the whole context and in windows.

    FLOPs count only visible query-key pairs: 4 * head_dim per pair and head forward, 10 backward (Dao 2023, arXiv
    2307.08691, section 4.1). Masked pairs that a backend computes anyway only cost time.
    """
    rows, context, heads, head_dim, short = bench.choose(  # d4 on CPUs, d20 on GPUs
        tiny=(2, 16, 2, 16, 4), cpu=(8, 512, 2, 128, 128), cuda=(16, 2048, 10, 128, 512)
    )
    shape = (rows, context, heads, head_dim)
    cases, flops = {}, {}
    for window in (context, short):
        pairs = rows * heads * sum(min(position + 1, window) for position in range(context))
        for backend in attention_backends(bench.device):
            name = f"{backend} {'full' if window == context else f'window {window}'}"
            cases[name] = _attend(shape, window, backend, bench.device)
            flops[name] = ATTENTION_FLOPS * head_dim * pairs
    return {
        name: {"ms": s * 1e3, "tflop_s": flops[name] / s / 1e12, "shape": list(shape)}
        for name, s in median_seconds(bench, cases).items()
    }


def attention_backends(device: torch.device) -> list[str]:
    """The backends that training can choose; on CPUs not flex, whose code there is only for tests."""
    if device.type != "cuda":
        return ["sdpa", "blocked"]
    choose_backend(device, torch.bfloat16, [1], 1)  # activates the newest kernels, as training does
    return ["sdpa", "flex", "varlen"] if has_varlen() else ["sdpa", "flex"]


def _attend(shape: tuple[int, ...], window: int, backend: str, device: torch.device) -> Callable[[], object]:
    dtype = resolve_dtype("auto", device)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)
    return lambda: torch.autograd.grad(attend(q, k, v, window, None, backend), (q, k, v), gradient)


def cross_entropy(bench: Bench) -> Result:
    """Cross-entropy with the softcapped head, forward and backward: fused and chunked, compiled (on GPUs), and plain.

    Memory is the peak beyond the inputs: on GPUs the allocator's; on Linux CPUs the resident set's, each variant in a
    process of its own.
    """
    sizes: list[Size] = bench.choose(  # tokens, width, vocabulary
        tiny=[(64, 16, 128)],
        cpu=[(4096, 256, 8192), (4096, 512, 65536)],
        cuda=[(32768, 768, 32768), (32768, 1280, 65536)],
    )
    on_gpu = bench.device.type == "cuda"
    variants = ["fused", "plain"]
    if on_gpu and bench.settings.compile is not False and compile_error(bench.device) is None:
        variants = ["fused", "fused compiled", "plain"]
    result: Result = {}
    for size in sizes:
        seconds = median_seconds(bench, {name: _loss_and_gradients(name, size, bench.device) for name in variants})
        for name in variants:
            tokens, width, vocab = size
            values = {"ms": seconds[name] * 1e3, "tflop_s": 6 * tokens * width * vocab / seconds[name] / 1e12}
            if on_gpu:
                values["peak_extra_mb"] = _gpu_peak(name, size, bench.device) / 1e6
            elif RESET_PEAK.exists():
                values["peak_extra_mb"] = _cpu_peak_of_child(name, size) / 1e6
            result[f"{name} {tokens} x {width} x {vocab}"] = values
    return result


def _loss_and_gradients(name: str, size: Size, device: torch.device) -> Callable[[], object]:
    """A call that computes loss and gradients of hidden (tokens, width) and of weight (vocabulary, width), float32."""
    tokens, width, vocab = size
    dtype = resolve_dtype("auto", device)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def loss() -> Tensor:
        if name == "plain":
            logits = SOFTCAP * torch.tanh(F.linear(hidden, weight.to(dtype)).float() / SOFTCAP)
            return F.cross_entropy(logits, targets, reduction="sum")
        return softcap_cross_entropy(hidden, weight, targets, SOFTCAP, compiled=name == "fused compiled")

    return lambda: torch.autograd.grad(loss(), (hidden, weight))


def _gpu_peak(name: str, size: Size, device: torch.device) -> int:
    call = _loss_and_gradients(name, size, device)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak_of_child(name: str, size: Size) -> int:
    command = [sys.executable, "-m", "pipeline.bench.kernels", json.dumps([name, size])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _cpu_peak(name: str, size: Size) -> int:
    cpu = torch.device("cpu")
    _loss_and_gradients(name, (32, 16, 64), cpu)()  # loads the libraries
    call = _loss_and_gradients(name, size, cpu)
    RESET_PEAK.write_text("5")  # the peak starts again from what is resident now
    before = _peak_resident()
    call()
    return _peak_resident() - before


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    print(_cpu_peak(*json.loads(sys.argv[1])))
