"""Where the time of a training step goes: by part of the step, and by kind of work."""

import statistics
import time
from typing import TYPE_CHECKING, Any

from pipeline.bench.trainings import Training

if TYPE_CHECKING:
    from torch import Tensor
    from torch.profiler import profile


# Parts of the names of operators and kernels; the first that is found counts.
KINDS = {
    "attention": ("scaled_dot_product", "flash", "fmha", "attention", "flex"),
    "matmul": ("aten::mm", "aten::addmm", "bmm", "gemm", "nvjet", "cutlass", "xmma", "cublas", "_linear"),
    "compiled": ("triton_", "compiledfx", "cpp_fused", "torch-compiled", "compiledfunction"),
    "copy": ("copy_", "memcpy", "memset", "aten::cat", "clone", "zero_", "fill_"),
    "lookup": ("embedding", "index", "gather", "scatter"),
}


def phase_seconds(training: Training, rounds: int) -> dict[str, float]:
    """Seconds a step of: the layers forward, the head with the loss and its gradients, backward, the optimiser.

    The median over rounds; the device is waited for between the parts.
    """
    tokens, targets = one_pass(training)
    passes = training.settings.rows // training.settings.micro_batch
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        clock = _Clock(training)
        hidden = training.model.hidden(tokens)
        clock.lap("forward")
        loss = _head(training, hidden, targets)
        clock.lap("head")
        loss.backward()
        clock.lap("backward")
        _step(training)
        clock.lap("optimiser")
        for name, seconds in clock.laps.items():
            found.setdefault(name, []).append(seconds * (1 if name == "optimiser" else passes))
    return {name: statistics.median(values) for name, values in found.items()}


def kernel_shares(training: Training) -> dict[str, float]:
    """Parts of the time that operators (on GPUs: kernels) take in one pass and one step of the optimiser, by kind.

    By torch.profiler, which makes small operators look dearer than they are.
    """
    from torch.profiler import ProfilerActivity, profile

    tokens, targets = one_pass(training)
    on_gpu = training.world.device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as traced:
        training.model.loss(tokens, targets).backward()
        _step(training)
    totals: dict[str, float] = {}
    for name, microseconds in _operators(traced, on_gpu):
        totals[kind_of(name)] = totals.get(kind_of(name), 0.0) + microseconds
    whole = sum(totals.values()) or 1.0
    return {kind: value / whole for kind, value in sorted(totals.items(), key=lambda item: -item[1])}


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "elementwise")


def _operators(traced: "profile", on_gpu: bool) -> list[tuple[str, float]]:
    """(name, microseconds of its own)."""
    from torch.autograd import DeviceType

    events: Any = traced.key_averages()
    if on_gpu:
        return [(e.key, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    return [(e.key, e.self_cpu_time_total) for e in events]


def one_pass(training: Training) -> "tuple[Tensor, Tensor]":
    """Tokens and targets of the first pass of the first step."""
    from pipeline.stages.training import make_batches

    tokens, targets = make_batches(training.work, training.settings, training.world)(0)
    size, device = training.settings.micro_batch, training.world.device
    return tokens[:size].to(device), targets[:size].to(device)


def _head(training: Training, hidden: "Tensor", targets: "Tensor") -> "Tensor":
    from model.gpt import SOFTCAP
    from model.loss import softcap_cross_entropy

    model = training.model
    return softcap_cross_entropy(hidden, model.lm_head.weight, targets, SOFTCAP, model.compiled)


def _step(training: Training) -> None:
    from model.training.schedule import Schedule

    rates = Schedule(training.work.config.schedule, training.work.steps).at(0)
    training.optimizer.step(rates, 1.0 / training.work.total_batch_tokens, training.work.config.grad_clip)


class _Clock:
    def __init__(self, training: Training) -> None:
        self.device, self.laps = training.world.device, dict[str, float]()
        self._wait()
        self.mark = time.perf_counter()

    def lap(self, name: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.laps[name] = now - self.mark
        self.mark = now

    def _wait(self) -> None:
        from model.hardware import synchronise

        synchronise(self.device)
