"""Training: whole steps and where their time goes, the optimiser, checkpoints, and whether d32 fits into 80 GB."""

import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.device import DATASHEET, memory_bytes, peak_flops, synchronise
from model.gpt import SOFTCAP
from model.loss import softcap_cross_entropy
from model.training.batch_size import divisors
from model.training.trainer import Trainer
from pipeline.bench import jobs
from pipeline.bench.jobs import JOBS, WARM_STEPS, Config, StepTimer, TimedSaver, prepared, run_trainer
from pipeline.bench.registry import Bench, Result, Skipped
from pipeline.bench.timing import Cases, median_seconds

FIT_BYTES = 80e9
# Parts of the names of operators and kernels; the first that is found counts.
KINDS = {
    "attention": ("scaled_dot_product", "flash", "fmha", "attention", "flex"),
    "matmul": ("aten::mm", "aten::addmm", "bmm", "gemm", "nvjet", "cutlass", "xmma", "cublas", "_linear"),
    "compiled": ("triton_", "compiledfx", "cpp_fused", "torch-compiled", "compiledfunction"),
    "copy": ("copy_", "memcpy", "memset", "aten::cat", "clone", "zero_", "fill_"),
    "lookup": ("embedding", "index", "gather", "scatter"),
}


def train_step(bench: Bench) -> Result:
    """Whole training steps through model.training.trainer, by job, eager and compiled.

    mfu is the training FLOPs of the model (6 per matmul parameter and 12 * width per visible token, for each token) per
    second over the GPU datasheet's 16-bit peak; of_matmul the same over the matmul rate measured between the steps,
    median over median, and best over best. first_step_extra_s, mostly compiling, is the first step beyond a usual one.
    """
    result: Result = {}
    for name in jobs.job_names(bench):
        for compiled in jobs.compile_modes(bench):
            label = f"{name} {'compiled' if compiled else 'eager'}"
            config = jobs.compose(bench, JOBS[name])
            while too_many := _measure_steps(bench, config, compiled, label, result):
                jobs.free_memory(bench)
                config.launch.device_batch_size = fewer = divisors(too_many)[-2]
                bench.say(f"  {label}: out of memory with {too_many} rows per pass, trying {fewer}")
    return result


def _measure_steps(bench: Bench, config: Config, compiled: bool, label: str, result: Result) -> int | None:
    """Measure one job. Returns None, or the rows per pass for which there was not enough memory.

    Raises torch.OutOfMemoryError if one row is too much.
    """
    stride = 3 if bench.device.type == "cuda" else 1  # reading the clock makes the CPU wait for the GPU
    rows = 1
    try:
        with prepared(bench, config, WARM_STEPS + bench.settings.repeats * stride, compiled) as trainer:
            rows = trainer.settings.micro_batch
            timer = StepTimer(bench.device, stride, trainer.settings.dtype, bench.settings.tiny)
            run_trainer(trainer, timer)
            result[label] = _rates(trainer, timer)
            bench.save(result)
            seconds = phase_seconds(trainer, max(2, len(timer.seconds) // 2))
            phases = {name: value / timer.median for name, value in seconds.items()}
            phases["rest"] = 1.0 - sum(phases.values())  # what the loop adds; negative if parts overlap in it
            result[label] |= {"phases": phases, "kernels": kernel_shares(trainer)}
            return None
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
        return rows


def _rates(trainer: Trainer, timer: StepTimer) -> dict[str, Any]:
    model: Any = trainer.model
    device, settings, tokens = trainer.world.device, trainer.settings, trainer.settings.config.total_batch_tokens
    flops = settings.flops_per_token * tokens
    matmul, best_matmul = statistics.median(timer.matmul_rates), max(timer.matmul_rates)
    found: dict[str, Any] = {
        "params": model.config.num_params(),
        "tokens_per_step": tokens,
        "micro_batch_rows": settings.micro_batch,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "attention": model.attention_backend,
        "tok_s": tokens / timer.median,
        "step_ms": timer.median * 1e3,
        "best_step_ms": min(timer.seconds) * 1e3,
        "first_step_extra_s": timer.first - timer.median,
        "tflop_s": flops / timer.median / 1e12,
        "matmul_tflop_s": matmul / 1e12,
        "best_matmul_tflop_s": best_matmul / 1e12,
        "of_matmul": flops / timer.median / matmul,
        "of_matmul_best": flops / min(timer.seconds) / best_matmul,
        "memory_mb": memory_bytes(device) / 1e6,
    }
    if device.type == "cuda" and any(part in torch.cuda.get_device_name(device) for part in DATASHEET):
        found["mfu"] = flops / timer.median / peak_flops(device, settings.dtype)
    return found


def phase_seconds(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Seconds per step of the layers forward, the head with the loss, backward, and the optimiser: medians over rounds.

    The device is synchronised between the parts.
    """
    model: Any = trainer.model
    device = trainer.world.device
    tokens, targets = first_pass(trainer)
    passes = trainer.settings.rows // trainer.settings.micro_batch

    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    found: list[list[float]] = []
    for _ in range(rounds):
        marks = [now()]
        hidden = model.hidden(tokens)
        marks.append(now())
        loss = softcap_cross_entropy(hidden, model.lm_head.weight, targets, SOFTCAP, model.compiled)
        marks.append(now())
        loss.backward()
        marks.append(now())
        _step(trainer)
        marks.append(now())
        found.append([after - before for before, after in itertools.pairwise(marks)])
    forward, head, backward, optimiser = map(statistics.median, zip(*found))
    return {"forward": forward * passes, "head": head * passes, "backward": backward * passes, "optimiser": optimiser}


def first_pass(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Tokens and targets of the first pass of the first step."""
    tokens, targets = trainer.batches(0)
    size, device = trainer.settings.micro_batch, trainer.world.device
    return tokens[:size].to(device), targets[:size].to(device)


def _step(trainer: Trainer) -> None:
    config = trainer.settings.config
    trainer.optimizer.step(trainer.schedule.at(0), 1.0 / config.total_batch_tokens, config.grad_clip)


def kernel_shares(trainer: Trainer) -> dict[str, float]:
    """Share of each kind of operator (on GPUs: kernel) in the time of one pass and one step of the optimiser.

    By torch.profiler, whose own cost makes small operators look more expensive than they are.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    model: Any = trainer.model
    tokens, targets = first_pass(trainer)
    on_gpu = trainer.world.device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as traced:
        model.loss(tokens, targets).backward()
        _step(trainer)
    totals: dict[str, float] = {}
    events: Any = traced.key_averages()
    for event in events:
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        kind = kind_of(event.key)
        totals[kind] = totals.get(kind, 0.0) + (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    whole = sum(totals.values()) or 1.0
    return {kind: value / whole for kind, value in sorted(totals.items(), key=lambda item: -item[1])}


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "elementwise")


def optimiser(bench: Bench) -> Result:
    """The optimiser's step alone, by rule (Muon, AdamW), and its share of a training step without the loop around it.

    Gradients are random, because zeros would be cheaper.
    """
    result: Result = {}
    compiled = jobs.compile_modes(bench)[-1]
    for name in jobs.job_names(bench):
        with prepared(bench, jobs.compose(bench, JOBS[name]), 10, compiled) as trainer:
            phase_seconds(trainer, 1)  # compiles
            parts = phase_seconds(trainer, bench.settings.repeats)
            seconds = median_seconds(bench, _updates(trainer))
            result[name] = {
                "step_ms": parts["optimiser"] * 1e3,
                **{f"{rule}_ms": s * 1e3 for rule, s in seconds.items()},
                "share_of_step": parts["optimiser"] / sum(parts.values()),
                "with": "compiled" if compiled else "eager",
            }
    return result


def _updates(trainer: Trainer) -> Cases:
    """Calls that update all parameters of each rule, by the rule's name."""
    rates = trainer.schedule.at(0)
    rules: dict[str, list[Any]] = {}
    for bucket, rule in trainer.optimizer.parts:
        rules.setdefault(type(rule).__name__.lower(), []).append(rule)
        bucket.grads.normal_(std=1e-3)

    @torch.no_grad()
    def update(same: list[Any]) -> None:
        for rule in same:
            rule.update(rates, 1)

    return {name: partial(update, same) for name, same in rules.items()}


def checkpoint(bench: Bench) -> Result:
    """The time that saving a checkpoint takes from the training that goes on meanwhile.

    A job saves once, in its middle. The steps that run until the files are written count as far as they are slower than
    the median before the save. The share is of the time between two saves at launch.save_minutes.
    """
    result: Result = {}
    before = max(3, bench.settings.repeats)
    for name in jobs.job_names(bench):
        config = jobs.compose(bench, JOBS[name])
        config.launch.save_every = WARM_STEPS + before
        with prepared(bench, config, WARM_STEPS + 3 * before, jobs.compile_modes(bench)[-1]) as trainer:
            timer, saver, minutes = StepTimer(bench.device), trainer.saver, config.launch.save_minutes
            assert isinstance(saver, TimedSaver)
            saver.left = 1
            run_trainer(trainer, timer)
            usual = statistics.median(timer.seconds[:before])
            lost = stall(timer.seconds[before:], usual, saver.seconds["copy_s"] + saver.seconds["write_s"])
            result[name] = {
                "step_ms": usual * 1e3,
                "mb": sum(path.stat().st_size for path in saver.folder.rglob("*.safetensors")) / 1e6,
                **saver.seconds,
                "stall_s": lost,
                "save_minutes": minutes,
                "share_of_time": lost / (minutes * 60) if minutes else 0.0,
            }
    return result


def stall(after: list[float], usual: float, until: float) -> float:
    """Seconds lost by the steps that begin within `until` seconds of the save."""
    lost = passed = 0.0
    for seconds in after:
        if passed > until:
            break
        passed += seconds
        lost += max(0.0, seconds - usual)
    return lost


def fit(bench: Bench) -> Result:
    """Peak memory of whole steps of d32 with 8 rows of 2,048 tokens per pass, on a GPU limited to 80 GB.

    fits: it did not run out of memory. If it did and the GPU has more, it is measured again without the limit.
    """
    if bench.device.type != "cuda":
        raise Skipped("needs CUDA")
    total = torch.cuda.get_device_properties(bench.device).total_memory
    name = "tiny" if bench.settings.tiny else "d32"
    result: Result = {name: _peak_memory(bench, name, min(1.0, FIT_BYTES / total)) | {"limit_gb": FIT_BYTES / 1e9}}
    if not result[name]["fits"] and total > FIT_BYTES:
        bench.save(result)
        result[f"{name} without the limit"] = _peak_memory(bench, name, 1.0)
    return result


def _peak_memory(bench: Bench, name: str, share: float) -> dict[str, Any]:
    """share: the part of the GPU's memory that may be used."""
    jobs.free_memory(bench)
    torch.cuda.reset_peak_memory_stats(bench.device)
    torch.cuda.set_per_process_memory_fraction(share, bench.device)
    try:
        config = jobs.compose(bench, JOBS[name])
        with prepared(bench, config, WARM_STEPS + bench.settings.repeats, True) as trainer:
            timer = StepTimer(bench.device)
            run_trainer(trainer, timer)
            return {
                "fits": True,
                "allocated_gb": torch.cuda.max_memory_allocated(bench.device) / 1e9,
                "held_gb": torch.cuda.max_memory_reserved(bench.device) / 1e9,
                "tok_s": config.params.total_batch_tokens / timer.median,
            }
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
