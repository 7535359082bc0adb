"""The training loop of pretrain, midtrain and sft: rows -> micro-batches -> backward -> optimiser."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import TrainConfig
from model.device import matmul_flops, memory_bytes, peak_flops
from model.distributed import World
from model.errors import ModelError
from model.gpt import GPT
from model.optim.optimiser import Optimizer
from model.optim.schedule import Schedule
from model.training.checkpoint import Checkpointer
from model.training.loop import Hooks, Loop, LoopProgress, Pace
from model.training.prefetch import Batch, Batches, Prefetcher
from model.training.spikes import STILL_STEPS, NormGuard, is_guessing, is_spike

SMOOTHING = 0.9  # of the logged loss
COLLECT_EVERY = 500  # steps between garbage collections, which would otherwise fall into any step


@dataclass(frozen=True)
class Settings:
    """A run's settings as its stage has them, what they come to here, and how the run goes about it.

    rows: of a step on this rank. micro_batch: rows of one forward pass. dtype: what config.dtype comes to.
    """

    config: TrainConfig
    pace: Pace
    rows: int
    micro_batch: int
    dtype: torch.dtype
    flops_per_token: float
    epoch_rows: int | None = None  # rows of the whole data; null: unknown
    vocab_size: int | None = None  # gives the loss of guessing; null: unknown


@dataclass
class Progress(LoopProgress):
    empty: int = 0  # steps whose targets were all masked
    dropped: int = 0  # steps whose update was thrown away for its gradient norm
    norm_mean: float = 0.0  # of gradient norms, as NormGuard keeps it
    norm_count: int = 0
    loss: float = math.nan  # of the last logged step, nats per token
    smooth: float = 0.0  # running sum of SMOOTHING-weighted losses, not yet divided by its weights
    logged: int = 0  # losses logged
    no_gradient_since: int = 0  # first of the latest logged steps without a gradient; 0: the last one had one
    guessing_since: int = 0  # likewise, of those with a loss of ln(vocab_size)

    @property
    def loss_smooth(self) -> float:
        return self.smooth / (1 - SMOOTHING ** max(1, self.logged))


class Trainer(Loop):
    """Trains on rows. Parameters and gradients belong to the optimiser's buckets."""

    progress: Progress

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        schedule: Schedule,
        batches: Batches,
        settings: Settings,
        world: World,
        hooks: Hooks,
        saver: Checkpointer,
    ) -> None:
        super().__init__(model, optimizer, schedule, settings.pace, settings.dtype, world, hooks, saver)
        self.batches, self.settings = batches, settings
        self.guard = NormGuard(settings.config.skip_spikes)
        self.dropped = False  # whether the step that has just ended was
        self.peak = peak_flops(world.device, settings.dtype) * world.size
        self.interval_seconds, self.interval_tokens = 0.0, 0  # since the last logged step
        self.shown: dict[str, float] = {}  # of the last logged step, beside the progress

    def opened(self, stack: ExitStack) -> None:
        progress, micro_batch = self.progress, self.settings.micro_batch
        self.guard.mean, self.guard.count = progress.norm_mean, progress.norm_count
        self.prefetcher = Prefetcher(self.batches, progress.step, self.pace.steps, micro_batch, self.world.device)
        stack.callback(self.prefetcher.close)
        stack.enter_context(calm_garbage_collection())

    def next_step(self) -> bool:
        """Train, log, save and evaluate, in this order. False: asked to stop, and saved."""
        started = time.perf_counter()
        batch = self.prefetcher.next()
        stop, save, (count,) = self.agree(sum(batch.counted))
        if stop:
            return self.stop()
        losses, norm = self._train(batch, count)
        progress = self.progress
        progress.step += 1
        progress.tokens += count
        save = save or self.due(self.pace.save_every)
        logged, evaluated = self.due(self.pace.log_every), self.evaluation_due()
        logged = logged and count > 0  # without a target there is no loss, and a loss of 0 would count as one
        loss = self._mean_loss(losses, norm, count) if count and (logged or evaluated or save) else math.nan
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        self.interval_seconds += seconds
        self.interval_tokens += batch.tokens.numel() * self.world.size
        progress.record = self._measure(loss, norm) if logged else {}
        if logged:
            self.hooks.log(progress.step, **progress.record)
            self.shown = {name: progress.record[name] for name in ("loss", "tok_s", "mfu")}
            self._check_that_it_learns(loss, progress.record["grad_norm"])
        self.hooks.progress(progress.step, self.pace.steps, **self.shown)
        if progress.step % COLLECT_EVERY == 0:
            gc.collect()
        return self.end_step(save, evaluated)

    def _train(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """One step. Returns the sum of this rank's losses and the gradient norm, both on the device."""
        size, total = self.settings.micro_batch, torch.zeros((), device=self.world.device)
        for tokens, targets, counted in zip(batch.tokens.split(size), batch.targets.split(size), batch.counted):
            if not counted:
                continue
            loss = self.model.loss(tokens, targets)
            (loss * self.scale.value if self.scale.active else loss).backward()
            total += loss.detach()
        if not count:
            self.progress.empty += 1
            self.hooks.say(f"step {self.progress.step + 1} had no target to train on and was skipped")
            return total, torch.zeros_like(total)
        rates = self.schedule.at(self.progress.step)
        scale = 1.0 / (count * self.scale.value)
        drop_above = self.guard.limit() if self.guard.active or self.scale.active else None
        norm = self.optimizer.step(rates, scale, self.settings.config.grad_clip, drop_above)
        if drop_above is not None:
            self._note_norm(float(norm), drop_above)
        return total, norm

    def _note_norm(self, norm: float, drop_above: float) -> None:
        """Learn from the gradient norm of a step that may have been dropped for it."""
        finite = math.isfinite(norm)
        self.dropped = not finite or norm > drop_above
        self.progress.dropped += self.dropped
        if self.scale.active:
            self.scale.update(finite)
        if self.guard.active:
            self.guard.note(norm)
            if self.dropped:
                self.hooks.say(f"step {self.progress.step + 1} was dropped: its gradient norm was {norm:.3g}")

    def _mean_loss(self, losses: Tensor, norm: Tensor, count: int) -> float:
        """Nats per target of the step that has just ended. The only place where the host waits for the device.

        Raises Diverged for a loss or a gradient norm that a run does not recover from.
        """
        progress = self.progress
        self.world.sum(losses)
        loss = float(losses) / count
        wrong = ""
        if not math.isfinite(loss):
            wrong = f"loss became {loss}"
        # Where steps can be dropped, one whose gradients overflow was; elsewhere it has reached the weights.
        elif not (self.scale.active or self.guard.active) and not math.isfinite(float(norm)):
            wrong = f"gradient norm became {float(norm)}"
        elif not self.dropped and is_spike(loss, progress.loss_smooth, progress.logged):
            wrong = f"loss jumped from about {progress.loss_smooth:.3g} to {loss:.3g}"
        if wrong:
            self.diverged(wrong, progress.step)
        return loss

    def _check_that_it_learns(self, loss: float, norm: float) -> None:
        """Raises ModelError when for many steps there was no gradient, or the loss stayed that of guessing.

        Looks only at what was logged, so that the host waits for the device no more often.
        """
        progress, vocab_size = self.progress, self.settings.vocab_size
        rate = max(self.optimizer.learning_rates(self.schedule.at(progress.step - 1)).values())
        warm = self.schedule.config.warmup_steps
        stuck = norm == 0 and rate > 0 and loss > 0  # at a loss of 0 everything is learnt
        progress.no_gradient_since = (progress.no_gradient_since or progress.step) if stuck else 0
        guesses = rate > 0 and progress.step > warm and vocab_size is not None and is_guessing(loss, vocab_size)
        progress.guessing_since = (progress.guessing_since or progress.step) if guesses else 0
        for since, what in (
            (progress.no_gradient_since, "the gradient norm has been exactly 0"),
            (progress.guessing_since, f"the loss has been ln({vocab_size}), that of guessing,"),
        ):
            if since and progress.step - since >= STILL_STEPS:
                raise ModelError(
                    f"the model does not learn: {what} from step {since} to {progress.step} (loss {loss:.4f}, gradient "
                    f"norm {norm:.3g}, highest rate {rate:.3g}, warm-up until step {warm}). Check the rates "
                    "(optim.*_lr, optim.init_lr_frac, lr_frac), the dtype, and the architecture if it is your own"
                )

    def _measure(self, loss: float, norm: Tensor) -> dict[str, Any]:
        """Metrics of the step that has just ended; tok_s and mfu are over the steps since the last logged one."""
        progress, settings, world = self.progress, self.settings, self.world
        progress.loss = loss
        progress.logged += 1
        progress.smooth = SMOOTHING * progress.smooth + (1 - SMOOTHING) * loss
        tokens_per_second = self.interval_tokens / self.interval_seconds
        self.interval_seconds, self.interval_tokens = 0.0, 0
        rates = self.schedule.at(progress.step - 1)
        if world.device.type == "cpu":  # other programs may have had the cores when it was measured first
            self.peak = max(self.peak, matmul_flops(world.device, torch.float32, tries=1) * world.size)
        rows = settings.epoch_rows
        return {
            "loss": loss,
            "loss_smooth": progress.loss_smooth,
            "grad_norm": float(norm),
            **self.optimizer.learning_rates(rates),
            "momentum": rates.momentum,
            "tokens": progress.tokens,
            **({"epoch": progress.step * settings.rows * world.size / rows} if rows else {}),
            "tok_s": tokens_per_second,
            "mfu": tokens_per_second * settings.flops_per_token / self.peak,
            "seconds": progress.seconds,
            "memory_mb": memory_bytes(world.device) / 1e6,
        }

    def save(self) -> None:
        self.progress.norm_mean, self.progress.norm_count = self.guard.mean, self.guard.count
        super().save()


@contextmanager
def calm_garbage_collection() -> Iterator[None]:
    """Collect only when asked: a collection in the middle of a step holds up every rank."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
