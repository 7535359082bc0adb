"""Training jobs to measure: overrides of the pipeline's own configuration, run by its own code on random tokens."""

import dataclasses
import functools
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.tokens.packing import BatchOrder, split_targets
from model.device import synchronise
from model.distributed import seed_everything, start
from model.gpt import new_model
from model.kernels.matmul import mm
from model.optim.optimiser import Optimizer
from model.optim.schedule import Schedule
from model.training.checkpoint import Checkpointer, Keep
from model.training.trainer import Progress, Trainer
from pipeline import typed
from pipeline.bench.registry import Bench, QuietJob, check_names, read_value
from pipeline.bench.timing import seconds_of
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.stages import pretrain
from pipeline.stages.training import Work, make_batches, make_hooks, make_settings, set_up_process

JOBS = {
    "tiny": "model.depth=2 model.width=32 model.head_dim=16 model.vocab_size=512 model.sequence_len=32 "
    "pretrain.params.total_batch_tokens=64",
    "small": "model.depth=4 model.vocab_size=1024 model.sequence_len=256 pretrain.params.total_batch_tokens=1024",
    "d4": "model.depth=4 model.vocab_size=8192 model.sequence_len=512 pretrain.params.total_batch_tokens=8192",
    "d12": "model.depth=12 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=524288",
    "d20": "model.depth=20 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=524288",
    "d32": "model.depth=32 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=16384 "
    "launch.device_batch_size=8",
}
# What `model=modern optim=muon_modern` changes in the cost of a step, spelled out because Hydra may be missing here.
MODERN = "model=modern optim.normuon=true optim.cautious=true"

WARM_STEPS = 2  # the first compiles, the second still allocates


@dataclass
class Config:
    """Params and launch settings of pretrain; `composed` is the whole configuration, empty without Hydra."""

    params: pretrain.Params
    launch: Launch
    composed: dict[str, Any]


def job_names(bench: Bench) -> list[str]:
    """The jobs to measure. Raises UserError for an unknown one."""
    check_names(bench.settings.jobs or [], JOBS, "bench.jobs")
    return bench.choose(tiny=["tiny"], cpu=bench.settings.jobs or ["d4"], cuda=bench.settings.jobs or ["d12", "d20"])


def compose(bench: Bench, *overrides: str) -> Config:
    """Compose as `run` would: these overrides, then the command line's. Raises UserError."""
    words = [word for text in overrides for word in text.split()] + bench.overrides
    own = {"device": bench.device.type, "threads": bench.settings.threads, "nproc": 1}
    if importlib.util.find_spec("hydra") is None:
        found, composed = read_plainly(words), {}
        params, launch = found["params"], found["launch"]
    else:
        from pipeline.config import compose as config

        composed = config.compose(["recipe=d20", *words])
        settings = config.settings(composed)
        stage = settings.stages["pretrain"]
        params, launch = stage.params, dataclasses.asdict(settings.launch) | stage.launch
    built = typed.build(pretrain.Params, params, "pretrain.params")
    return Config(built, typed.build(Launch, launch | own, "launch"), composed)


def read_plainly(words: list[str]) -> dict[str, dict[str, Any]]:
    """Read overrides without Hydra as {"params": pretrain's, "launch": ...}: no groups but model, and the dataclasses'
    defaults for what is not set. Raises UserError."""
    found: dict[str, dict[str, Any]] = {"params": {"model": {}, "optim": {}}, "launch": {}}
    for word in words:
        name, _, text = word.partition("=")
        path = name.removeprefix("pretrain.").split(".")
        if path == ["model"]:
            path = ["model", "arch"]
        if path[0] in ("model", "optim"):
            path = ["params", *path]
        if path[0] not in found or len(path) < 2:
            raise UserError(f"{word}: only model.*, optim.*, launch.* and pretrain.params.* work without hydra-core")
        level: dict[str, Any] = found
        for key in path[:-1]:
            level = level.setdefault(key, {})
        level[path[-1]] = read_value(name, text)
    return found


@functools.cache
def compile_error(device: torch.device) -> str | None:
    """Try torch.compile, which needs a C++ compiler for CPUs and Triton for GPUs. None if it works, else the reason."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(64, device=device))
    except (BackendCompilerFailed, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None


def compile_modes(bench: Bench) -> list[bool]:
    """Values of launch.compile to measure: bench.compile, else True on GPUs, and both on CPUs where it works."""
    if bench.settings.compile is not None:
        return [bench.settings.compile]
    if bench.device.type == "cuda":
        return [True]
    if bench.settings.tiny:
        return [False]
    if error := compile_error(bench.device):
        bench.say(f"  not compiled: {error}")
    return [False] if error else [False, True]


class RandomRows:
    """Rows of T + 1 random tokens, small ids more often than large ones, as in text."""

    def __init__(self, count: int, sequence_len: int, vocab_size: int) -> None:
        self.sequence_len = sequence_len
        uniform = np.random.default_rng(0).random((count, sequence_len + 1))
        self.rows = (uniform**3 * vocab_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return split_targets(self.rows[indices])


class TimedSaver(Checkpointer):
    """Saves the next `left` times it is asked to, and measures copying the state and writing it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.left = 0
        self.seconds: dict[str, float] = {}

    def save(self, *state: Any) -> None:
        if self.left:
            self.left -= 1
            started = time.perf_counter()
            super().save(*state)
            self.seconds["copy_s"] = time.perf_counter() - started

    def _write(self, *parts: Any) -> None:
        started = time.perf_counter()
        super()._write(*parts)
        self.seconds["write_s"] = time.perf_counter() - started


@contextmanager
def prepared(bench: Bench, config: Config, steps: int, compiled: bool) -> Iterator[Trainer]:
    """A trainer that has done nothing yet, set up as in pipeline.stages.training; its memory is freed afterwards."""
    params, world = config.params, start(0, 0, 1, bench.device.type)
    config.launch.compile = compiled
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        job = QuietJob("pretrain", "0" * 16, params, config.launch, {}, Path(folder), Path(folder))
        set_up_process(job, None)
        seed_everything(params.seed, 0)
        size = params.model.resolved()
        rows = RandomRows(max(64, params.total_batch_tokens // size.sequence_len), size.sequence_len, size.vocab_size)
        work = Work(
            model=new_model(size, params.seed),
            rows=rows,
            order=lambda per_step: BatchOrder(len(rows), per_step, params.seed),
            steps=steps,
            config=params,
            validation=None,
            gentler="",
        )
        model = work.model.to(world.device)
        optimizer = Optimizer(model, params.optim, size.width, world)
        settings = make_settings(job, work, world, None)
        if compiled:
            model.use_compiler()
        trainer = Trainer(
            model,
            optimizer,
            Schedule(params.schedule, steps),
            make_batches(work, settings, world),
            settings,
            world,
            make_hooks(job, work, model, settings, world),
            TimedSaver(job.out / "checkpoints", world, job.key, Keep(), job.say),
        )
        del work, model, optimizer
        try:
            yield trainer
        finally:
            vars(trainer).clear()  # the caller's variable would keep its memory
            torch._dynamo.reset()  # the number of compiled versions of a function is limited
            free_memory(bench)


def free_memory(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


class StepTimer:
    """Seconds per training step after the first WARM_STEPS, read every `stride` steps.

    With `ceiling`, the rate of a square matmul in that dtype (2,048 wide on CPUs, 8,192 on GPUs) is sampled between the
    readings, so that other load on the machine slows both.
    """

    def __init__(self, device: torch.device, stride: int = 1, ceiling: torch.dtype | None = None, tiny=False) -> None:
        self.device, self.stride = device, stride
        self.first = 0.0  # seconds of the first step
        self.seconds: list[float] = []
        self.matmul_rates: list[float] = []  # FLOP/s
        self.matrices: list[torch.Tensor] = []
        if ceiling:
            size = 128 if tiny else 2048 if device.type == "cpu" else 8192
            self.matrices = [torch.randn(size, size, device=device).to(ceiling) for _ in range(2)]
            mm(*self.matrices)
        self.mark = time.perf_counter()

    def step_done(self, done: int, *_: Any, **shown: Any) -> None:
        if done > WARM_STEPS and (done - WARM_STEPS) % self.stride:
            return
        synchronise(self.device)
        passed = time.perf_counter() - self.mark
        if done == 1:
            self.first = passed
        elif done > WARM_STEPS:
            self.seconds.append(passed / self.stride)
        if done >= WARM_STEPS and self.matrices:
            seconds = seconds_of(lambda: mm(*self.matrices), self.device, 1 if self.device.type == "cpu" else 10)
            self.matmul_rates.append(2 * len(self.matrices[0]) ** 3 / seconds)
        self.mark = time.perf_counter()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_trainer(trainer: Trainer, timer: StepTimer) -> None:
    trainer.hooks.progress = timer.step_done
    timer.mark = time.perf_counter()
    trainer.run(Progress())
