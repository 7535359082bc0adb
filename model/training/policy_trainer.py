"""The training loop of rl: sampled answers to problems, advantages, backward, optimiser. policy.py has the loss."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from model.device import memory_bytes
from model.distributed import World
from model.gpt import GPT
from model.optim.optimiser import Optimizer
from model.optim.schedule import Schedule
from model.training.checkpoint import Checkpointer
from model.training.loop import Hooks, Loop, LoopProgress, Pace
from model.training.policy import Objective, Rollout, RolloutBatch, batches, divergence, loss, token_logprobs


class Group(Protocol):
    """All answers to one problem; has_signal: they differ in reward, else there is nothing to learn from them."""

    @property
    def rollouts(self) -> list[Rollout]: ...

    @property
    def rewards(self) -> list[float]: ...

    @property
    def has_signal(self) -> bool: ...


G = TypeVar("G", bound=Group)


@dataclass(frozen=True)
class PolicySettings:
    """problems: of a step over all ranks, each answered `samples` times. updates: of the optimiser on them, each on a
    part. batch_tokens: padded tokens of one backward pass."""

    problems: int
    samples: int
    updates: int
    temperature: float  # of the policy that is trained
    objective: Objective
    grad_clip: float | None
    batch_tokens: int


@dataclass
class PolicyProgress(LoopProgress):
    skipped: int = 0  # groups without signal


class Rollouts(Protocol[G]):
    """The worker that answers and grades; its randomness depends on step and problem alone."""

    def generate(self, step: int) -> list[G]:
        """This rank's problems of the step, every world_size-th of them."""

    def keep(self, step: int, groups: list[G]) -> None:
        """Write some down; called on one rank."""

    def epoch(self, step: int) -> float:
        """How often the problems have been seen after `step` steps."""


@dataclass
class _Sums:
    """Sums over the updates of a step on this rank."""

    tokens: int = 0
    entropy: float = 0.0
    divergence: float = 0.0
    norm: float = 0.0


class PolicyTrainer(Loop):
    """Trains a model on what it writes itself."""

    evaluates_first = True
    progress: PolicyProgress

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        schedule: Schedule,
        rollouts: Rollouts[Any],
        settings: PolicySettings,
        pace: Pace,
        world: World,
        hooks: Hooks,
        saver: Checkpointer,
    ) -> None:
        """Before a checkpoint is restored into the model: the divergence is measured from the weights it has now."""
        super().__init__(model, optimizer, schedule, pace, model.compute_dtype, world, hooks, saver)
        self.rollouts, self.settings = rollouts, settings
        self.start = copy.deepcopy(model).to(model.compute_dtype).eval().requires_grad_(False)

    def next_step(self) -> bool:
        """Generate, train, log, save and evaluate, in this order. False: asked to stop, and saved."""
        started = time.perf_counter()
        self.model.eval()
        groups = self.rollouts.generate(self.progress.step)
        self.model.train()
        generated = time.perf_counter() - started
        stop, save, _ = self.agree()
        if stop:
            return self.stop()
        logs_divergence = self._logs_divergence()
        sums = self._learn(groups, logs_divergence)
        progress = self.progress
        progress.step += 1
        progress.seconds += time.perf_counter() - started
        progress.record = self._measure(groups, sums, generated, time.perf_counter() - started, logs_divergence)
        self.hooks.log(progress.step, **progress.record)
        if self.world.is_main:
            self.rollouts.keep(progress.step, groups)
        shown = {name: progress.record[name] for name in ("reward", "signal", "response_tokens")}
        self.hooks.progress(progress.step, self.pace.steps, **shown, **progress.evaluated)
        return self.end_step(save or self.due(self.pace.save_every), self.evaluation_due())

    def _logs_divergence(self) -> bool:
        """It takes a pass of another model, so not at each step, unless it is trained on."""
        step = self.progress.step + 1
        return self.settings.objective.kl > 0 or step % self.pace.log_every == 0 or step == self.pace.steps

    def _learn(self, groups: list[Group], logs_divergence: bool) -> _Sums:
        """The step's updates, each on its part of the problems, whatever the number of ranks; groups: this rank's."""
        sums, settings = _Sums(), self.settings
        for update in range(settings.updates):
            places = range(self.world.rank, self.world.rank + len(groups) * self.world.size, self.world.size)
            updates = [place * settings.updates // settings.problems for place in places]
            mine = [group for group, its in zip(groups, updates) if its == update and group.has_signal]
            part = [rollout for group in mine for rollout in group.rollouts]
            count = self.world.sum_host([sum(sum(rollout.trained) for rollout in part)])[0]
            if count:
                for batch in batches(part, settings.batch_tokens, self.world.device):
                    self._backward(batch, sums, logs_divergence)
                self._update(count, sums)
        return sums

    def _backward(self, batch: RolloutBatch, sums: _Sums, logs_divergence: bool) -> None:
        temperature, start = self.settings.temperature, None
        if logs_divergence:
            with torch.no_grad():
                start, _ = token_logprobs(self.start, batch, temperature)
        logprobs, entropy = token_logprobs(self.model, batch, temperature)
        value = loss(logprobs, batch, self.settings.objective, start)
        (value * self.scale.value).backward()
        sums.tokens += len(logprobs)
        sums.entropy += float(entropy.sum())
        if start is not None:
            sums.divergence += float(divergence(logprobs.detach(), start).sum())

    def _update(self, count: int, sums: _Sums) -> None:
        """One step of the optimiser, on `count` trained tokens over all ranks. Raises Diverged."""
        rates = self.schedule.at(self.progress.step)
        scale = 1.0 / (count * self.scale.value)
        drop_above = math.inf if self.scale.active else None
        norm = float(self.optimizer.step(rates, scale, self.settings.grad_clip, drop_above))
        if self.scale.active:
            self.scale.update(math.isfinite(norm))
        elif not math.isfinite(norm):
            self.diverged(f"gradient norm became {norm}", self.progress.step + 1)
        sums.norm = norm
        self.progress.tokens += count

    def _measure(
        self, groups: list[Group], sums: _Sums, generated: float, seconds: float, logs_divergence: bool
    ) -> dict[str, Any]:
        """Metrics of a step, over all ranks."""
        progress = self.progress
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = sum(len(rollout.tokens) for rollout in rollouts)
        mine = [len(groups), len(rollouts), sum(rollout.reward for rollout in rollouts), lengths]
        mine += [sum(group.has_signal for group in groups), sum(max(group.rewards) > 0 for group in groups)]
        mine += [sum(rollout.reward > 0 for rollout in rollouts), sums.tokens, sums.entropy, sums.divergence]
        count, answers, reward, length, signal, solved, right, tokens, entropy, kl = self.world.sum_floats(mine)
        progress.skipped += int(count - signal)
        return {
            "reward": reward / answers,
            "pass@1": right / answers,
            f"pass@{self.settings.samples}": solved / count,
            "response_tokens": length / answers,
            "signal": signal / count,
            **({"entropy": entropy / tokens} if tokens else {}),
            **({"kl": kl / tokens} if tokens and logs_divergence else {}),
            "grad_norm": sums.norm,
            **self.optimizer.learning_rates(self.schedule.at(progress.step - 1)),
            "tokens": progress.tokens,
            "epoch": self.rollouts.epoch(progress.step),
            "skipped_groups": progress.skipped,
            "rollout_tok_s": length / generated,
            "rollout_seconds": generated,
            "step_seconds": seconds,
            "memory_mb": memory_bytes(self.world.device) / 1e6,
        }
