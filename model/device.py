"""The device that computes: which one, its peak FLOP/s, the memory in use, traces of what it does."""

import ctypes
import resource
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from model.errors import ModelError
from model.kernels.matmul import mm

DATASHEET = {  # dense bfloat16 FLOP/s by a part of the device's name; the first that matches counts
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # their numbers in glibc's malloc.h
SKIPPED, WARM, TRACED = 2, 1, 3  # steps of a trace


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there.get(wanted):
        raise ModelError(f"launch.device={wanted}: this machine has none that torch can use; try launch.device=auto")
    if wanted != "cuda":
        return torch.device(wanted)
    if local_rank >= torch.cuda.device_count():
        raise ModelError(f"launch.nproc asks for GPU {local_rank}, but there are {torch.cuda.device_count()}: lower it")
    return torch.device("cuda", local_rank)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s: the datasheet's for a known GPU in 16 bits, else what GEMMs reach now (takes a fraction of a second).

    CPUs are measured in float32: many have no fast GEMM in 16 bits.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in DATASHEET.items() if part in name), None)
        if known:
            return known
    return matmul_flops(device, torch.float32 if device.type == "cpu" else dtype)


def matmul_flops(device: torch.device, dtype: torch.dtype, tries: int = 4) -> float:
    """The best of a few square matmuls."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        synchronise(device)
        started = time.perf_counter()
        mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process on the device; of the process itself on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Make glibc keep large freed buffers instead of returning them to the system and faulting every page in again:
    a fifth of a training step on CPUs. No effect with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def tracer(folder: Path, rank: int, device: torch.device) -> profile:
    """A context that traces a few steps; call its step() after each one. Writes trace-RANK.pt.trace.json into `folder`,
    for Perfetto (ui.perfetto.dev) and TensorBoard's profiler plugin, which needs this name."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    return profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED, warmup=WARM, active=TRACED, repeat=1),
        on_trace_ready=lambda traced: traced.export_chrome_trace(str(folder / f"trace-{rank}.pt.trace.json")),
    )
