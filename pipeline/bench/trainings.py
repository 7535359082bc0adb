"""A training job as its stage would run it, on made-up rows, for as long as it is measured.

Model, optimiser, settings, batches and the loop are those of pipeline.stages.training and model.training.trainer. Rows
are random tokens, small ids more often than large ones, as in text.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench.compiling import forget
from pipeline.bench.configs import Config
from pipeline.bench.settings import Bench
from pipeline.bench.timing import Ceiling
from pipeline.job import Job

if TYPE_CHECKING:
    import numpy as np

    from model.gpt import GPT
    from model.optim.optimiser import Optimizer
    from model.training.checkpoint import Checkpointer
    from model.training.distributed import World
    from model.training.trainer import Settings
    from pipeline.stages.training import Work


WARM_STEPS = 2  # the first compiles, the second still allocates


class MadeUpRows:
    """Rows of T + 1 random tokens."""

    def __init__(self, count: int, sequence_len: int, vocab_size: int) -> None:
        import numpy as np

        self.sequence_len = sequence_len
        uniform = np.random.default_rng(0).random((count, sequence_len + 1))
        self.rows = (uniform**3 * vocab_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
        from data.tokens.packing import split_targets

        return split_targets(self.rows[indices])


@dataclass
class Training:
    """Everything of a job but its loop."""

    job: Job[Any]
    work: "Work"
    model: "GPT"
    optimizer: "Optimizer"
    settings: "Settings"
    world: "World"

    @property
    def flops_per_step(self) -> float:
        return self.settings.flops_per_token * self.work.total_batch_tokens


@contextmanager
def prepared(bench: Bench, config: Config, steps: int, compiled: bool) -> Iterator[Training]:
    """The job in a folder that goes with it. Afterwards its memory is free again."""
    from model.optim.optimiser import Optimizer
    from model.training.distributed import start
    from model.training.rng import seed_everything
    from pipeline.stages.training import make_settings, set_up_process

    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        job: Job[Any] = _Quiet("pretrain", "0" * 16, config.params, config.launch, {}, Path(folder), Path(folder))
        job.launch.compile = compiled
        work = make_work(config, steps)
        world = start(0, 0, 1, str(bench.device.type))
        set_up_process(job, None)
        seed_everything(work.config.seed, 0)
        model = work.model.to(world.device)
        assert model.config.width
        optimizer = Optimizer(model, work.config.optim, model.config.width, world)
        training = Training(job, work, model, optimizer, make_settings(job, work, world, None), world)
        if compiled:
            model.use_compiler()
        del work, model, optimizer
        try:
            yield training
        finally:
            vars(training).clear()  # the caller's variable would keep its memory
            forget()
            free_memory(bench)


def free_memory(bench: Bench) -> None:
    import torch

    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def make_work(config: Config, steps: int) -> "Work":
    from data.tokens.packing import BatchOrder
    from model.gpt import new_model
    from pipeline.stages.training import Work

    params = config.params
    model = params.model.resolved()
    assert model.vocab_size
    rows = MadeUpRows(max(64, params.total_batch_tokens // model.sequence_len), model.sequence_len, model.vocab_size)
    return Work(
        model=new_model(model, params.seed),
        rows=rows,
        order=lambda per_step: BatchOrder(len(rows), per_step, params.seed),
        steps=steps,
        config=params,
        validation=None,
        gentler="",
    )


class _Quiet(Job[Any]):
    """A job that keeps its words to itself."""

    def say(self, text: str) -> None:
        self.context.setdefault("said", []).append(text)

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        """Nobody watches."""


@dataclass
class StopWatch:
    """Reads the clock every `stride` steps once the first ones are over, and measures the ceiling in between."""

    ceiling: Ceiling
    stride: int = 1
    first: float = 0.0  # seconds of the first step
    seconds: list[float] = field(default_factory=list)  # a step
    mark: float = field(default_factory=time.perf_counter)

    def step_done(self, done: int) -> None:
        from model.hardware import synchronise

        if done > WARM_STEPS and (done - WARM_STEPS) % self.stride:
            return
        synchronise(self.ceiling.device)
        passed = time.perf_counter() - self.mark
        if done == 1:
            self.first = passed
        elif done > WARM_STEPS:
            self.seconds.append(passed / self.stride)
        if done >= WARM_STEPS:
            self.ceiling.sample()
        self.mark = time.perf_counter()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_trainer(training: Training, watch: StopWatch, saver: "Checkpointer | None" = None) -> None:
    """All steps of the job through model.training.trainer; without a saver nothing is saved."""
    from model.training.checkpoint import Checkpointer, Keep
    from model.training.schedule import Schedule
    from model.training.trainer import Progress, Trainer
    from pipeline.stages.training import make_batches, make_hooks

    class Unsaved(Checkpointer):
        def save(self, *state: Any) -> None:
            """What is measured is worth nothing afterwards."""

    job, work, world = training.job, training.work, training.world
    if saver is None:
        saver = Unsaved(job.out / "checkpoints", world, job.key, Keep(), job.say)
    hooks = make_hooks(job, work, training.model, training.settings, world)
    hooks.progress = lambda done, total, **shown: watch.step_done(done)
    trainer = Trainer(
        training.model,
        training.optimizer,
        Schedule(work.config.schedule, work.steps),
        make_batches(work, training.settings, world),
        training.settings,
        world,
        hooks,
        saver,
    )
    watch.mark = time.perf_counter()
    trainer.run(Progress())
