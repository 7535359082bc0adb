"""A trace of a few steps, for Perfetto (ui.perfetto.dev) and TensorBoard's profiler plugin, which needs the name."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM, TRACED = 2, 1, 3  # steps


def tracer(folder: Path, rank: int, device: torch.device) -> profile:
    """A context; call its step() after each training step. Writes trace-RANK.pt.trace.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    return profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED, warmup=WARM, active=TRACED, repeat=1),
        on_trace_ready=lambda traced: traced.export_chrome_trace(str(folder / f"trace-{rank}.pt.trace.json")),
    )
