"""Memory copies, counted as bytes read plus bytes written, of buffers that no cache holds."""

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns


def measure(bench: Bench) -> Result:
    """GB/s on the device; on GPUs also from and to pinned host memory (there, bytes moved)."""
    import torch

    size = 1 << 16 if bench.settings.tiny else 1 << (32 if bench.device.type == "cuda" else 29)
    source = torch.randint(0, 100, (size // 8,), device=bench.device)
    target = torch.empty_like(source)
    cases = {"copy": lambda: target.copy_(source)}
    moved = {"copy": 2 * size}
    if bench.device.type == "cuda":
        host = torch.empty(size // 32, dtype=source.dtype, pin_memory=True)
        part = source[: len(host)]
        cases |= {"host to device": lambda: part.copy_(host), "device to host": lambda: host.copy_(part)}
        moved |= {"host to device": size // 4, "device to host": size // 4}
    seconds = in_turns(cases, bench.settings.repeats, bench.device)
    return {name: {"gb_s": moved[name] / min(times) / 1e9, "gb": size / 1e9} for name, times in seconds.items()}
