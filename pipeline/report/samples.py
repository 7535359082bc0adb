"""What the models said: continuations, answers stage by stage, graded conversations and rollouts."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.numbers import plural
from pipeline.report.made import Made, evaluations

PIECE = re.compile(
    r"<\|python_start\|>(?P<call>.*?)(?:<\|python_end\|>|$)"
    r"|<\|output_start\|>(?P<output>.*?)(?:<\|output_end\|>|$)"
    r"|(?P<text>.+?)(?=<\|python_start\|>|<\|output_start\|>|$)",
    re.DOTALL,
)
SPECIAL = re.compile(r"<\|[a-z_]+\|>")


class Part(NamedTuple):
    """A piece of what a model said: `text`, a tool's `call` or its `output`."""

    kind: str
    text: str


class Answer(NamedTuple):
    """What one stage's model said; right is None where nobody graded it."""

    stage: str
    parts: list[Part]
    right: bool | None = None


Exchanges = dict[tuple[str, str], list[Answer]]  # by title, which may be empty, and prompt


class Group(NamedTuple):
    """folded: the title under which it is hidden until asked for. continued: answers continue the prompt's text."""

    exchanges: Exchanges
    folded: str = ""
    continued: bool = False


def samples(made: Sequence[Made], limit: int, talks: int) -> list[Group]:
    """Up to `limit` exchanges of each kind, and `talks` graded questions of each task."""
    continued, answered, graded, held_out, tried = (defaultdict[tuple[str, str], list[Answer]](list) for _ in range(5))
    for m in evaluations(made):
        drawn = answered if m.results.get("chat") else continued
        for sample in m.results.get("samples") or []:
            drawn["", sample["prompt"]].append(Answer(m.short, parts(sample["text"].strip())))
        for talk in m.results.get("conversations") or []:
            answer = Answer(m.short, parts(talk["completion"]), bool(talk["correct"]))
            graded[talk["task"], talk["prompt"]].append(answer)
    for lines in (m.json_lines("rollouts.jsonl") for m in made):
        for line in (line for line in lines if line.get("held_out")):
            held_out[line["task"], line["prompt"]].append(_rewarded(line, f"step {line['step']}, reward"))
        rollouts = [line for line in lines if not line.get("held_out")]
        for line in rollouts[:: max(1, len(rollouts) // max(1, limit))][:limit]:  # from the first step to the last
            tried[f"{line['task']}, step {line['step']}", line["prompt"]].append(_rewarded(line, "reward"))
    tasks = dict.fromkeys(task for task, _ in graded)
    asked = [key for task in tasks for key in [k for k in graded if k[0] == task][:talks]]
    problems = plural(len(_first(held_out, limit)), "held-out problem")
    groups = [
        Group(_first(continued, limit), continued=True),
        Group(_first(answered, limit)),
        Group({key: graded[key] for key in asked}, plural(len(asked), "graded question")),
        Group(_first(held_out, limit), f"{problems} at each evaluation of reinforcement learning"),
        Group(tried, f"{plural(sum(map(len, tried.values())), 'rollout')} of reinforcement learning"),
    ]
    return [group for group in groups if group.exchanges]


def _first(exchanges: Exchanges, limit: int) -> Exchanges:
    return dict(list(exchanges.items())[:limit])


def _rewarded(line: dict[str, Any], label: str) -> Answer:
    return Answer(f"{label} {line['reward']:g}", parts(line["completion"]), line["reward"] > 0)


def parts(completion: str) -> list[Part]:
    """A decoded completion as text, tool calls and results; other special tokens are left out."""
    pieces = [(match.lastgroup or "", match[match.lastgroup or 0]) for match in PIECE.finditer(completion)]
    found = [Part(kind, SPECIAL.sub("", text) if kind == "text" else text) for kind, text in pieces]
    return [part for part in found if part.kind != "text" or part.text.strip()]
