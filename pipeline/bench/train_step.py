"""Whole training steps through model.training.trainer: tokens/s, and how much of the device's matmul rate that is.

The ceiling is measured between the steps, so that a busy machine slows both. mfu is the training FLOPs of the model
(6 a matmul parameter and 12 * width a token seen, and token) per second over the GPU datasheet's 16-bit peak;
of_matmul the same over the measured rate, median over median, and best over best. What compiling cost is what the first
step took beyond a usual one. Where the time goes is measured after that, in passes of their own.
"""

from dataclasses import replace
from typing import Any

from model.training.split import divisors
from pipeline.bench import configs
from pipeline.bench.phases import kernel_shares, phase_seconds
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import Ceiling
from pipeline.bench.trainings import WARM_STEPS, StopWatch, Training, free_memory, prepared, run_trainer

STRIDE = {"cuda": 3}  # steps between two readings of the clock: a GPU must not be waited for at each


def measure(bench: Bench) -> Result:
    """By job and way of running it."""
    result: Result = {}
    for name in configs.names(bench):
        for compiled in ways(bench):
            label = f"{name} {'compiled' if compiled else 'eager'}"
            config = configs.compose(bench, configs.JOBS[name])
            while too_many := attempt(bench, config, compiled, label, result):
                free_memory(bench)
                fewer = divisors(too_many)[-2]
                bench.say(f"  {label}: out of memory with {too_many} rows per pass, trying {fewer}")
                config = replace(config, launch=replace(config.launch, device_batch_size=fewer))
    return result


def attempt(bench: Bench, config: configs.Config, compiled: bool, label: str, result: Result) -> int | None:
    """Measure one job. Returns None, or the rows per pass for which there was not enough memory.

    Raises torch.OutOfMemoryError if one row is too much.
    """
    import torch

    stride, rows = STRIDE.get(bench.device.type, 1), 1
    try:
        with prepared(bench, config, WARM_STEPS + bench.settings.repeats * stride, compiled) as training:
            rows = training.settings.micro_batch
            watch = StopWatch(Ceiling(bench.device, training.settings.dtype, bench.settings.tiny), stride)
            run_trainer(training, watch)
            result[label] = rates(training, watch)
            bench.save(result)
            result[label] |= {"phases": shares(training, watch), "kernels": kernel_shares(training)}
            return None
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
        return rows


def ways(bench: Bench) -> list[bool]:
    """Whether to compile: what the settings say, else what this device trains with, and on CPUs both."""
    from pipeline.bench.compiling import why_not

    if bench.settings.compile is not None:
        return [bench.settings.compile]
    if bench.device.type == "cuda":
        return [True]
    if bench.settings.tiny:
        return [False]
    cannot = why_not(bench.device)
    if cannot:
        bench.say(f"  not compiled: {cannot}")
    return [False] if cannot else [False, True]


def rates(training: Training, watch: StopWatch) -> dict[str, Any]:
    from model.hardware import DATASHEET, memory_bytes, peak_flops

    device, settings = training.world.device, training.settings
    flops = training.flops_per_step
    found: dict[str, Any] = {
        "params": training.model.config.num_params(),
        "tokens_per_step": training.work.total_batch_tokens,
        "micro_batch_rows": settings.micro_batch,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "attention": training.model.attention_backend,
        "tok_s": training.work.total_batch_tokens / watch.median,
        "step_ms": watch.median * 1e3,
        "best_step_ms": min(watch.seconds) * 1e3,
        "first_step_extra_s": watch.first - watch.median,
        "tflop_s": flops / watch.median / 1e12,
        "matmul_tflop_s": watch.ceiling.median / 1e12,
        "best_matmul_tflop_s": watch.ceiling.best / 1e12,
        "of_matmul": flops / watch.median / watch.ceiling.median,
        "of_matmul_best": flops / min(watch.seconds) / watch.ceiling.best,
        "memory_mb": memory_bytes(device) / 1e6,
    }
    if device.type == "cuda":
        import torch

        if any(part in torch.cuda.get_device_name(device) for part in DATASHEET):
            found["mfu"] = flops / watch.median / peak_flops(device, settings.dtype)
    return found


def shares(training: Training, watch: StopWatch) -> dict[str, float]:
    """Parts of a step, each measured by itself; the rest is what the loop adds, or what overlaps (negative)."""
    seconds = phase_seconds(training, rounds=max(2, len(watch.seconds) // 2))
    parts = {name: value / watch.median for name, value in seconds.items()}
    return parts | {"rest": 1.0 - sum(parts.values())}
