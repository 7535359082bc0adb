"""The rollout worker of rl: problems answered by the model as it is, graded by their tasks, some kept to be read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.job import Job

if TYPE_CHECKING:
    from data.tasks.task import Check, Task
    from data.tokens.tokenizer import Tokenizer
    from evals.sandbox.box import Sandbox
    from model.decoding.engine import Engine
    from model.decoding.sampling import Sampling
    from model.distributed import World
    from model.training.policy import Rollout
    from pipeline.stages.rl import Params


ROLLOUTS = "rollouts.jsonl"


@dataclass(frozen=True)
class Problem:
    """Item `item` of a task; `name` is the task's."""

    task: "Task"
    name: str
    item: int


@dataclass(frozen=True)
class Group:
    """All answers to one problem. Without differences in reward there is nothing to learn from it."""

    problem: Problem
    rollouts: "list[Rollout]"
    texts: list[str]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    @property
    def has_signal(self) -> bool:
        return len(set(self.rewards)) > 1


class RolloutWorker:
    """Answers and grades this rank's share of the problems. The randomness of an answer depends on step and problem
    alone, so that any number of ranks gives the same."""

    def __init__(
        self,
        job: "Job[Params]",
        world: "World",
        engine: "Engine",
        tokenizer: "Tokenizer",
        sandbox: "Sandbox",
        problems: list[Problem],
        held_out: list[Problem],
    ) -> None:
        from data.tokens.packing import BatchOrder

        self.job, self.params, self.world = job, job.params, world
        self.engine, self.tokenizer, self.sandbox = engine, tokenizer, sandbox
        self.problems, self.held_out = problems, held_out
        self.order = BatchOrder(len(problems), job.params.problems, job.params.seed)

    def generate(self, step: int) -> list[Group]:
        """This rank's problems of the step; one that comes again in the step is answered anew."""
        from evals.chat import item_seed
        from model.decoding.sampling import Sampling

        params = self.params
        places = self.order.step_rows(step).tolist()
        turns = range(self.world.rank, params.problems, self.world.size)
        sampling = [
            Sampling(
                temperature=params.temperature,
                top_k=params.top_k,
                seed=item_seed(params.seed, f"rl {step}" + " again" * places[:turn].count(places[turn]), places[turn]),
                max_tokens=params.max_new_tokens,
            )
            for turn in turns
        ]
        off_policy = params.clip is not None and params.updates > 1
        return self.groups([self.problems[places[turn]] for turn in turns], sampling, params.samples, off_policy)

    def epoch(self, step: int) -> float:
        """How often the problems have been seen after `step` steps."""
        return self.order.epoch(step)

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Held-out accuracy of the likeliest answers as eval/NAME, its 95% interval as eval_low/ and eval_high/NAME.

        None where the run is to stop, as answers were cut short. Some answers are kept.
        """
        from evals.metrics import wilson
        from model.decoding.sampling import Sampling

        mine = self.held_out[self.world.rank :: self.world.size]
        sampling = [Sampling(temperature=0.0, max_tokens=self.params.max_new_tokens)] * len(mine)
        groups = self.groups(mine, sampling, 1, False)
        names = list(dict.fromkeys(problem.name for problem in self.held_out))
        rewards = {name: [group.rewards[0] for group in groups if group.problem.name == name] for name in names}
        totals = self.world.sum_floats([value for own in rewards.values() for value in (sum(own), len(own))])
        if self.world.sum_host([int(self.job.should_stop)])[0]:
            return None
        measured, bounds = {}, {}
        for name, right, count in zip(names, totals[::2], totals[1::2]):
            measured[f"eval/{name}"] = right / int(count)
            bounds[f"eval_low/{name}"], bounds[f"eval_high/{name}"] = wilson(right / int(count), int(count))
        if self.world.is_main:
            keep_answers(self.job.out, step, groups, self.params.keep)
        return measured | bounds

    def keep(self, step: int, groups: list[Group]) -> None:
        """Add a few rollouts of a step to rollouts.jsonl, those with something to learn from first."""
        groups = sorted(groups, key=lambda group: not group.has_signal)
        with open(self.job.out / ROLLOUTS, "a") as file:
            for place in range(min(self.params.keep, sum(len(group.rollouts) for group in groups))):
                group = groups[place % len(groups)]
                file.write(json.dumps(describe_rollout(step, group, place // len(groups))) + "\n")

    def groups(self, problems: list[Problem], sampling: "list[Sampling]", samples: int, logprobs: bool) -> list[Group]:
        """`samples` answers to each problem, graded; all in one pass of the engine, cut short when asked to stop."""
        import torch

        from data.chat.conversation import render_prompt
        from model.training.policy import Rollout, advantages

        prompts = [render_prompt(problem.task.conversation(problem.item), self.tokenizer) for problem in problems]
        made = self.engine.generate(prompts, sampling, samples, logprobs, lambda: self.job.should_stop)
        groups = []
        for place, problem in enumerate(problems):
            completions = made[place * samples : (place + 1) * samples]
            texts = [self.tokenizer.decode(completion.written) for completion in completions]
            rewards = [self.grade(problem, text) for text in texts]
            gained = advantages(torch.tensor([rewards]), self.params.divide_by_std)[0].tolist()
            rollouts = [
                Rollout(c.prompt, c.tokens, [not forced for forced in c.forced], reward, advantage, c.logprobs)
                for c, reward, advantage in zip(completions, rewards, gained)
            ]
            groups.append(Group(problem, rollouts, texts))
        return groups

    def grade(self, problem: Problem, text: str) -> float:
        """Raises UserError where a program may not run, and for a verdict that a model would learn to forge."""

        def execute(program: str, check: "Check | None" = None) -> Any:
            execution = self.sandbox(program, check)
            if execution.status == "refused":
                raise UserError(execution.detail, "launch.sandbox")
            if execution.advisory and not self.params.advisory:
                raise UserError(
                    f"task {problem.name} runs programs that report their own verdicts, which a model would learn to "
                    "forge",
                    "params.tasks",
                    "Pass a data.tasks.task.Check to execute(), or set advisory = True in the task's class to leave it "
                    "out",
                )
            return execution

        return float(problem.task.grade(problem.item, text, execute))


def keep_answers(folder: Path, step: int, groups: list[Group], count: int) -> None:
    """Add the answers to the first `count` held-out problems of each task; the same problems at each evaluation."""
    kept: dict[str, int] = {}
    with open(folder / ROLLOUTS, "a") as file:
        for group in groups:
            kept[group.problem.name] = place = kept.get(group.problem.name, 0) + 1
            if place <= count:
                file.write(json.dumps(describe_rollout(step, group, 0) | {"held_out": True}) + "\n")


def describe_rollout(step: int, group: Group, place: int) -> dict[str, Any]:
    from data.chat.conversation import text_of

    rollout = group.rollouts[place]
    question = group.problem.task.conversation(group.problem.item)["messages"]
    asked = [text_of(message["content"]) for message in question if message["role"] == "user"]
    return {
        "step": step,
        "task": group.problem.name,
        "prompt": asked[-1],
        "completion": group.texts[place],
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "tokens": len(rollout.tokens),
    }


def drop_rollouts(folder: Path, step: int) -> None:
    """Forget what is made again: rollouts of steps after `step`, held-out answers from `step` on (it is measured after
    saving), and a line that a crash cut off."""
    from data.durable import write_text

    path = folder / ROLLOUTS
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            kept_line = json.loads(line)
            if kept_line["step"] + bool(kept_line.get("held_out")) <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_text(path, "".join(kept))
