"""Problems to practise on, answered by the model as it is and graded by their tasks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.tasks.task import Check, Task
    from data.tokens.tokenizer import Tokenizer
    from evals.sandbox.box import Sandbox
    from model.decoding.engine import Completion, Engine
    from model.decoding.sampling import Sampling
    from model.training.policy import Rollout

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


class Answerer:
    """Asks the model and grades what it says. advisory: also by programs that report their own verdicts."""

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "Tokenizer",
        sandbox: "Sandbox",
        should_stop: Callable[[], bool],
        advisory: bool = False,
    ) -> None:
        self.engine, self.tokenizer, self.sandbox, self.should_stop = engine, tokenizer, sandbox, should_stop
        self.advisory = advisory

    def ask(
        self, problems: list[Problem], sampling: "list[Sampling]", samples: int, logprobs: bool
    ) -> "list[list[Completion]]":
        """`samples` completions of each problem, all in one pass of the engine; cut short when asked to stop."""
        from data.chat.conversation import render_prompt

        prompts = [render_prompt(problem.task.conversation(problem.item), self.tokenizer) for problem in problems]
        made = self.engine.generate(prompts, sampling, samples, logprobs, self.should_stop)
        return [made[place : place + samples] for place in range(0, len(made), samples)]

    def text(self, completion: "Completion") -> str:
        return self.tokenizer.decode(completion.written)

    def grade(self, problem: Problem, text: str) -> float:
        def execute(program: str, check: "Check | None" = None) -> Any:
            return self._execute(problem.name, program, check)

        return float(problem.task.grade(problem.item, text, execute))

    def _execute(self, task: str, program: str, check: "Check | None") -> Any:
        """Raises UserError where no program may run, and for a verdict that a model would learn to forge."""
        from pipeline.errors import UserError

        execution = self.sandbox(program, check)
        if execution.status == "refused":
            raise UserError(execution.detail, "launch.sandbox")
        if execution.advisory and not self.advisory:
            raise UserError(
                f"task {task} runs programs that report their own verdicts, which a model would learn to forge",
                "params.tasks",
                "Pass a data.tasks.task.Check to execute(), or set advisory = True in the task's class to leave it out",
            )
        return execution

    def groups(
        self,
        problems: list[Problem],
        sampling: "list[Sampling]",
        samples: int,
        divide_by_std: bool,
        logprobs: bool,
    ) -> list[Group]:
        """A group of graded rollouts for each problem."""
        import torch

        from model.training.policy import Rollout, advantages

        groups = []
        for problem, completions in zip(problems, self.ask(problems, sampling, samples, logprobs)):
            texts = [self.text(completion) for completion in completions]
            rewards = [self.grade(problem, text) for text in texts]
            gained = advantages(torch.tensor([rewards]), divide_by_std)[0].tolist()
            rollouts = [
                Rollout(c.prompt, c.tokens, [not forced for forced in c.forced], reward, advantage, c.logprobs)
                for c, reward, advantage in zip(completions, rewards, gained)
            ]
            groups.append(Group(problem, rollouts, texts))
        return groups

    def likeliest(self, problems: list[Problem], max_tokens: int) -> "list[Group]":
        """Each problem with its likeliest answer, graded."""
        from model.decoding.sampling import Sampling

        sampling = [Sampling(temperature=0.0, max_tokens=max_tokens)] * len(problems)
        return self.groups(problems, sampling, 1, False, False)


def accuracy_sums(groups: list[Group]) -> dict[str, tuple[float, int]]:
    """By task name: the sum of grades, and how many problems there were."""
    sums: dict[str, tuple[float, int]] = {}
    for group in groups:
        right, count = sums.get(group.problem.name, (0.0, 0))
        sums[group.problem.name] = (right + group.rewards[0], count + 1)
    return sums


def keep_answers(folder: Path, step: int, groups: list[Group], count: int) -> None:
    """Add the answers to the first `count` held-out problems of each task; the same problems at each evaluation."""
    kept: dict[str, int] = {}
    with open(folder / ROLLOUTS, "a") as file:
        for group in groups:
            kept[group.problem.name] = place = kept.get(group.problem.name, 0) + 1
            if place <= count:
                file.write(json.dumps(describe_rollout(step, group, 0) | {"held_out": True}) + "\n")


def keep_rollouts(folder: Path, step: int, groups: list[Group], count: int) -> None:
    """Add a few rollouts of a step to rollouts.jsonl, those with something to learn from first."""
    groups = sorted(groups, key=lambda group: not group.has_signal)
    with open(folder / ROLLOUTS, "a") as file:
        for place in range(min(count, sum(len(group.rollouts) for group in groups))):
            group = groups[place % len(groups)]
            file.write(json.dumps(describe_rollout(step, group, place // len(groups))) + "\n")


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
