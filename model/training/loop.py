"""What every training run does around its steps: it resumes, logs, saves, stops when asked to, and evaluates."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.device import tracer
from model.distributed import World
from model.errors import Diverged
from model.gpt import GPT
from model.optim.optimiser import Optimizer
from model.optim.schedule import Schedule
from model.precision import LossScale
from model.training.checkpoint import Checkpointer


@dataclass(frozen=True)
class Pace:
    """When a run logs, saves and evaluates: every so many steps, and at the last one."""

    steps: int
    eval_every: int | None = None
    log_every: int = 10
    save_every: int | None = None
    save_minutes: float | None = 10.0
    trace: Path | None = None  # folder for a profiler trace


@dataclass
class Hooks:
    """What the loop calls on its way.

    evaluate: metrics of the model as it is; all ranks call it together. None where it was cut short because the run
    is to stop, which it must be on all ranks or on none.
    """

    log: Callable[..., None]  # (step, **metrics)
    progress: Callable[..., None]  # (done, total, **shown)
    say: Callable[[str], None]
    should_stop: Callable[[], bool]
    evaluate: Callable[[], dict[str, float] | None] | None = None


@dataclass
class LoopProgress:
    """How far a run is; travels in its checkpoints."""

    step: int = 0  # finished steps
    tokens: int = 0  # trained on, masked ones not counted
    seconds: float = 0.0  # of training, without saving and evaluating
    loss_scale: float = 1.0
    good_steps: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # what was logged at `step`
    evaluated: dict[str, float] = field(default_factory=dict)  # the newest metrics of evaluate


class Loop:
    """Base of Trainer and PolicyTrainer, which say what one step is."""

    evaluates_first = False  # before the first step
    progress: LoopProgress

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        schedule: Schedule,
        pace: Pace,
        dtype: torch.dtype,
        world: World,
        hooks: Hooks,
        saver: Checkpointer,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.pace, self.world, self.hooks, self.saver = pace, world, hooks, saver
        self.scale = LossScale(dtype)
        self.saved_at = time.monotonic()

    def next_step(self) -> bool:
        """Train, log, and end with end_step(). False: asked to stop, and saved."""
        raise NotImplementedError

    def opened(self, stack: ExitStack) -> None:
        """Open what is needed while steps run, to be closed by the stack."""

    def run(self, progress: LoopProgress) -> bool:
        """Train from `progress`, which is kept up to date, to the last step. False: asked to stop, and saved.

        Raises Diverged when the numbers are not finite, ModelError when the model does not learn at all.
        """
        self.progress = progress
        self.scale.value, self.scale.good_steps = progress.loss_scale, progress.good_steps
        self.model.train()
        with ExitStack() as stack:
            self.opened(stack)
            # The checkpoint's step was logged and evaluated after saving, which resuming has dropped from the log.
            if progress.record:
                self.hooks.log(progress.step, **progress.record)
            due = self.evaluation_due() if progress.step else self.evaluates_first
            if due and not self.evaluate():
                return False
            trace = self.pace.trace
            tracing = stack.enter_context(tracer(trace, self.world.rank, self.world.device)) if trace else None
            while progress.step < self.pace.steps:
                if not self.next_step():
                    return False
                if tracing:
                    tracing.step()
        self.saver.wait()
        return True

    def agree(self, *counts: int) -> tuple[bool, bool, list[int]]:
        """Whether to stop, whether to save, and sums over ranks of `counts`.

        One rank's clock decides, and any rank may be asked to stop: all must take the same way.
        """
        minutes = self.pace.save_minutes
        overdue = minutes is not None and time.monotonic() - self.saved_at > minutes * 60
        flags = [self.hooks.should_stop(), self.world.is_main and overdue]
        stop, save, *sums = self.world.sum_host([*(int(flag) for flag in flags), *counts])
        return bool(stop), bool(save), sums

    def end_step(self, save: bool, evaluate: bool) -> bool:
        """Save and evaluate, in this order. False: asked to stop, and saved."""
        if save:
            self.save()
        return not evaluate or self.evaluate()

    def due(self, every: int | None) -> bool:
        """The last step is always due: for logging, saving and evaluating."""
        at = self.progress.step
        return at == self.pace.steps or bool(every and at % every == 0)

    def evaluation_due(self) -> bool:
        return self.hooks.evaluate is not None and self.due(self.pace.eval_every)

    def evaluate(self) -> bool:
        """Without dropout. False: asked to stop, and saved; it is measured again on resuming."""
        if self.hooks.evaluate is None:
            return True
        self.model.eval()
        measured = self.hooks.evaluate()
        self.model.train()
        if measured is None:
            return self.stop()
        self.progress.evaluated = measured
        self.hooks.log(self.progress.step, **measured)
        return True

    def stop(self) -> bool:
        """Save; False, for next_step to return."""
        self.save()
        self.saver.wait()
        return False

    def save(self) -> None:
        self.progress.loss_scale, self.progress.good_steps = self.scale.value, self.scale.good_steps
        self.saver.save(self.progress.step, self.model, self.optimizer, asdict(self.progress))
        self.saved_at = time.monotonic()

    def diverged(self, wrong: str, step: int) -> NoReturn:
        saved = self.saver.wait()
        good = f"the last good checkpoint is of step {saved}" if saved is not None else "there is no checkpoint yet"
        raise Diverged(f"the {wrong} at step {step}; {good}")
