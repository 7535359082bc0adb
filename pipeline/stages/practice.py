"""The loop of rl: rollouts of a step's problems, advantages, backward, optimiser; measured and saved on the way."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.job import Job, Stopped
from pipeline.stages.rollouts import accuracy_sums, drop_rollouts, keep_answers, keep_rollouts

if TYPE_CHECKING:
    from model.distributed import World
    from model.gpt import GPT
    from model.training.checkpoint import Checkpointer
    from model.training.policy import Rollout, RolloutBatch
    from model.training.resume import Checkpoint
    from pipeline.stages.rl import Params
    from pipeline.stages.rollouts import Answerer, Group, Problem


@dataclass
class Progress:
    """How far the run is; travels in its checkpoints."""

    step: int = 0  # finished steps
    tokens: int = 0  # trained on
    skipped: int = 0  # groups without signal
    seconds: float = 0.0  # of rollouts and training
    loss_scale: float = 1.0
    good_steps: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # what was logged at `step`
    evaluated: dict[str, float] = field(default_factory=dict)  # the newest held-out accuracies


@dataclass
class Sums:
    """What a step's updates add up to on this rank."""

    tokens: int = 0
    entropy: float = 0.0
    divergence: float = 0.0
    norm: float = 0.0


class Practice:
    """A run. Every rank takes every world_size-th problem of a step; randomness depends on the problem alone."""

    def __init__(
        self,
        job: "Job[Params]",
        model: "GPT",
        world: "World",
        answerer: "Answerer",
        problems: "list[Problem]",
        held_out: "list[Problem]",
        steps: int,
        own: "Checkpoint | None",
    ) -> None:
        """own: where this very run stopped."""
        from data.tokens.packing import BatchOrder
        from model.optim.optimiser import Optimizer
        from model.optim.schedule import Schedule
        from model.precision import LossScale
        from model.training.policy import Objective
        from model.training.resume import restore
        from pipeline.stages.training import find_start

        params = job.params
        self.job, self.params, self.model, self.world, self.answerer = job, params, model, world, answerer
        self.problems, self.held_out, self.steps = problems, held_out, steps
        self.start = frozen_copy(model)  # what the divergence is measured from
        self.optimizer = Optimizer(model, params.optim, model.config.width, world, params.lr_frac)
        self.schedule = Schedule(params.schedule, steps)
        self.order = BatchOrder(len(problems), params.problems, params.seed)
        self.objective = Objective(params.clip, params.kl)
        self.scale = LossScale(model.compute_dtype)
        self.batch_tokens = self._batch_tokens()
        self.saver = self._saver(own)
        self.saved_at = time.monotonic()
        self.progress = Progress()
        if start_from := own or find_start(job, params.init, steps):
            restore(start_from, model, self.optimizer, world)
            self.progress = Progress(**start_from.progress)
            self.scale.value, self.scale.good_steps = self.progress.loss_scale, self.progress.good_steps

    def _batch_tokens(self) -> int:
        """Padded tokens of one backward pass: by rows where the user said how many, else what the device can do."""
        rows = self.job.launch.device_batch_size
        if rows != "auto":
            return int(rows) * self.model.config.sequence_len
        return 4_096 if self.world.device.type == "cpu" else 16_384

    def _saver(self, own: "Checkpoint | None") -> "Checkpointer":
        from model.config import TrainConfig
        from model.training.trainer import Settings
        from pipeline.stages.training import make_saver

        rows = self.params.problems * self.params.samples
        settings = Settings(
            config=TrainConfig(),
            steps=self.steps,
            rows=rows,
            micro_batch=self.batch_tokens,
            dtype=self.model.compute_dtype,
            flops_per_token=0.0,
        )
        return make_saver(self.job, self.model, settings, self.world, own)

    def run(self) -> None:
        """To the last step. Raises Stopped after saving, Diverged."""
        from model.device import tracer

        progress = self.progress
        if self.world.is_main:
            drop_rollouts(self.job.out, progress.step)
        if progress.record:
            self.job.log(progress.step, **progress.record)  # it came after saving, and was dropped on resuming
        if progress.step == 0 or self._due(self.params.eval_every):
            self.evaluate()
        profile = self.job.launch.profile
        trace = tracer(self.job.out / "profile", self.world.rank, self.world.device) if profile else None
        with trace or nullcontext():
            while progress.step < self.steps:
                self._next_step()
                if trace:
                    trace.step()
        self.saver.wait()

    def _next_step(self) -> None:
        started = time.perf_counter()
        groups = self._rollouts()
        generated = time.perf_counter() - started
        stop, save = self._agree(self.job.should_stop, self.world.is_main and self._time_to_save())
        if stop:
            self._stop()
        sums = self._learn(groups)
        progress, logs_divergence = self.progress, self._logs_divergence
        progress.step += 1
        progress.seconds += time.perf_counter() - started
        progress.record = self._describe(groups, sums, generated, time.perf_counter() - started, logs_divergence)
        self.job.log(progress.step, **progress.record)
        if self.world.is_main:
            keep_rollouts(self.job.out, progress.step, groups, self.params.keep)
        shown = {name: progress.record[name] for name in ("reward", "signal", "response_tokens")}
        self.job.progress(progress.step, self.steps, "steps", **shown, **progress.evaluated)
        if save or self._due(self.job.launch.save_every):
            self._save()
        if self._due(self.params.eval_every):
            self.evaluate()

    def _due(self, every: int | None) -> bool:
        at = self.progress.step
        return at == self.steps or bool(every and at % every == 0)

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag as soon as one rank has it."""
        return [bool(flag) for flag in self.world.sum_host([int(flag) for flag in flags])]

    def _stop(self) -> None:
        self._save()
        self.saver.wait()
        raise Stopped(f"checkpoint at step {self.saver.last_step} of {self.steps}")

    def _time_to_save(self) -> bool:
        minutes = self.job.launch.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at > minutes * 60

    def _save(self) -> None:
        self.progress.loss_scale, self.progress.good_steps = self.scale.value, self.scale.good_steps
        self.saver.save(self.progress.step, self.model, self.optimizer, asdict(self.progress))
        self.saved_at = time.monotonic()

    def _rollouts(self) -> "list[Group]":
        """This rank's problems of the step, answered and graded; one that comes again in the step is answered anew."""
        from evals.chat import item_seed
        from model.decoding.sampling import Sampling

        params, step = self.params, self.progress.step
        turns = range(self.world.rank, params.problems, self.world.size)
        places = self.order.step_rows(step).tolist()
        sampling = [
            Sampling(
                temperature=params.temperature,
                top_k=params.top_k,
                seed=item_seed(params.seed, f"rl {step}" + " again" * places[:turn].count(places[turn]), places[turn]),
                max_tokens=params.max_new_tokens,
            )
            for turn in turns
        ]
        problems = [self.problems[places[turn]] for turn in turns]
        with self._generating():
            off_policy = params.clip is not None and params.updates > 1
            return self.answerer.groups(problems, sampling, params.samples, params.divide_by_std, off_policy)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Without dropout."""
        self.model.eval()
        yield
        self.model.train()

    def _learn(self, groups: "list[Group]") -> Sums:
        """The step's updates, each on its part of the problems, whatever the number of ranks; groups: this rank's."""
        sums = Sums()
        for update in range(self.params.updates):
            mine = [group for place, group in enumerate(groups) if self._update_of(place) == update]
            part = [rollout for group in mine if group.has_signal for rollout in group.rollouts]
            count = self.world.sum_host([sum(sum(rollout.trained) for rollout in part)])[0]
            if count:
                self._update(part, count, sums)
        return sums

    def _update_of(self, place: int) -> int:
        """Which update the group at this place of this rank's belongs to."""
        return (self.world.rank + place * self.world.size) * self.params.updates // self.params.problems

    def _update(self, rollouts: "list[Rollout]", count: int, sums: Sums) -> None:
        """One step of the optimiser on rollouts with `count` trained tokens over all ranks."""
        from model.errors import Diverged
        from model.training.policy import batches
        from pipeline.stages.training import way_out

        for batch in batches(rollouts, self.batch_tokens, self.world.device):
            self._backward(batch, sums)
        rates = self.schedule.at(self.progress.step)
        scale = 1.0 / (count * self.scale.value)
        drop_above = math.inf if self.scale.active else None
        norm = float(self.optimizer.step(rates, scale, self.params.grad_clip, drop_above))
        if self.scale.active:
            self.scale.update(math.isfinite(norm))
        elif not math.isfinite(norm):
            saved = self.saver.wait()
            good = f"the last good checkpoint is of step {saved}" if saved is not None else "there is no checkpoint yet"
            gentler = way_out(self.job, saved, f"{self.job.stage}.params.lr_frac={self.params.lr_frac / 2:g}")
            raise Diverged(f"the gradient norm became {norm} at step {self.progress.step + 1}; {good}. {gentler}")
        sums.norm = norm
        self.progress.tokens += count

    def _backward(self, batch: "RolloutBatch", sums: Sums) -> None:
        import torch

        from model.training.policy import divergence, loss, token_logprobs

        start = None
        if self.objective.kl or self._logs_divergence:
            with torch.no_grad():
                start, _ = token_logprobs(self.start, batch, self.params.temperature)
        logprobs, entropy = token_logprobs(self.model, batch, self.params.temperature)
        value = loss(logprobs, batch, self.objective, start)
        (value * self.scale.value).backward()
        sums.tokens += len(logprobs)
        sums.entropy += float(entropy.sum())
        if start is not None:
            sums.divergence += float(divergence(logprobs.detach(), start).sum())

    @property
    def _logs_divergence(self) -> bool:
        """It takes a pass of another model, so not at each step."""
        return (self.progress.step + 1) % self.job.launch.log_every == 0 or self.progress.step + 1 == self.steps

    def _describe(
        self, groups: "list[Group]", sums: Sums, generated: float, seconds: float, logs_divergence: bool
    ) -> dict[str, Any]:
        """Metrics of a step, over all ranks."""
        from model.device import memory_bytes

        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = sum(len(rollout.tokens) for rollout in rollouts)
        mine = [len(groups), len(rollouts), sum(rollout.reward for rollout in rollouts), lengths]
        mine += [sum(group.has_signal for group in groups), sum(max(group.rewards) > 0 for group in groups)]
        mine += [sum(rollout.reward > 0 for rollout in rollouts), sums.tokens, sums.entropy, sums.divergence]
        totals = self._total(mine)
        count, answers, reward, length, signal, solved, right, tokens, entropy, kl = totals
        self.progress.skipped += int(count - signal)
        return {
            "reward": reward / answers,
            "pass@1": right / answers,
            f"pass@{self.params.samples}": solved / count,
            "response_tokens": length / answers,
            "signal": signal / count,
            **({"entropy": entropy / tokens} if tokens else {}),
            **({"kl": kl / tokens} if tokens and (self.objective.kl or logs_divergence) else {}),
            "grad_norm": sums.norm,
            **self.optimizer.learning_rates(self.schedule.at(self.progress.step - 1)),
            "tokens": self.progress.tokens,
            "epoch": self.order.epoch(self.progress.step),
            "skipped_groups": self.progress.skipped,
            "rollout_tok_s": length / generated,
            "rollout_seconds": generated,
            "step_seconds": seconds,
            "memory_mb": memory_bytes(self.world.device) / 1e6,
        }

    def _total(self, values: list[float]) -> list[float]:
        """Added up over ranks, in float64."""
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        self.world.sum(total)
        return total.tolist()

    def evaluate(self) -> None:
        """Held-out accuracy by task, greedily; logged as eval/NAME, its 95% interval as eval_low/ and eval_high/NAME.

        Some of the answers are kept.
        """
        from evals.metrics import wilson

        names = list(dict.fromkeys(problem.name for problem in self.held_out))
        with self._generating():
            mine = self.held_out[self.world.rank :: self.world.size]
            groups = self.answerer.likeliest(mine, self.params.max_new_tokens)
        sums = accuracy_sums(groups)
        totals = self._total([value for name in names for value in sums.get(name, (0.0, 0))])
        if self._agree(self.job.should_stop)[0]:
            self._stop()  # what was cut short is measured again on resuming
        if names:
            counts = dict(zip(names, map(int, totals[1::2])))
            accuracy = {name: right / counts[name] for name, right in zip(names, totals[::2])}
            bounds: dict[str, float] = {}
            for name in names:
                bounds[f"eval_low/{name}"], bounds[f"eval_high/{name}"] = wilson(accuracy[name], counts[name])
            self.progress.evaluated = {f"eval/{name}": accuracy[name] for name in names}
            self.job.log(self.progress.step, **self.progress.evaluated, **bounds)
            if self.world.is_main:
                keep_answers(self.job.out, self.progress.step, groups, self.params.keep)

    def metrics(self) -> dict[str, Any]:
        """Of the artifact: the last step's, and the newest held-out accuracies."""
        shown = ("reward", "pass@1", f"pass@{self.params.samples}", "response_tokens", "entropy", "kl")
        last = {name: self.progress.record[name] for name in shown if name in self.progress.record}
        counts = {"steps": self.progress.step, "tokens": self.progress.tokens, "skipped_groups": self.progress.skipped}
        return {**counts, **last, **self.progress.evaluated, "train_seconds": self.progress.seconds}


def frozen_copy(model: "GPT") -> "GPT":
    """The model as it is now, in its compute dtype."""
    import copy

    return copy.deepcopy(model).to(model.compute_dtype).eval().requires_grad_(False)
