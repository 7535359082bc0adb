"""What the models said: continuations, answers stage by stage, graded conversations and rollouts."""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.report.document import Answer, Exchange, Exchanges, Part
from pipeline.report.made import Made, evaluations
from pipeline.report.words import plural

PARTS = re.compile(
    r"<\|python_start\|>(?P<python>.*?)(?:<\|python_end\|>|$)|<\|output_start\|>(?P<python_output>.*?)(?:<\|output_end\|>|$)",
    re.DOTALL,
)
SPECIAL = re.compile(r"<\|[a-z_]+\|>")


def parts(completion: str) -> list[Part]:
    """A decoded completion as text, tool calls and results; other special tokens are left out."""
    found, at = [], 0
    for match in PARTS.finditer(completion):
        found.append(Part("text", SPECIAL.sub("", completion[at : match.start()])))
        kind = "python" if match["python"] is not None else "python_output"
        found.append(Part(kind, str(match[kind])))  # type: ignore[arg-type]
        at = match.end()
    found.append(Part("text", SPECIAL.sub("", completion[at:])))
    return [part for part in found if part.text.strip() or part.kind != "text"]


def continuations(made: Sequence[Made], limit: int) -> Exchanges | None:
    """How base models go on with a text."""
    return _side_by_side([m for m in evaluations(made) if not m.results.get("chat")], limit, True)


def answers(made: Sequence[Made], limit: int) -> Exchanges | None:
    """The same questions to each chat model."""
    return _side_by_side([m for m in evaluations(made) if m.results.get("chat")], limit, False)


def _side_by_side(made: Sequence[Made], limit: int, continued: bool) -> Exchanges | None:
    """Each sample's prompt once, with what every stage made of it."""
    said: dict[str, list[Answer]] = {}
    for m in made:
        for sample in m.results.get("samples") or []:
            said.setdefault(sample["prompt"], []).append(Answer(m.short, parts(sample["text"].strip())))
    items = [Exchange("", prompt, found, continued) for prompt, found in said.items()]
    return Exchanges(items[:limit]) if items else None


def graded(made: Sequence[Made], limit: int) -> Exchanges | None:
    """`limit` questions of each task with the answers of all stages that were asked them."""
    asked: dict[tuple[str, str], list[Answer]] = {}
    for m in evaluations(made):
        for talk in m.results.get("conversations") or []:
            answer = Answer(m.short, parts(talk["completion"]), bool(talk["correct"]))
            asked.setdefault((talk["task"], talk["prompt"]), []).append(answer)
    shown: dict[str, int] = {}
    items = []
    for (task, prompt), found in asked.items():
        shown[task] = shown.get(task, 0) + 1
        if shown[task] <= limit:
            items.append(Exchange(task, prompt, found))
    return Exchanges(items, plural(len(items), "graded question")) if items else None


def rollouts(made: Sequence[Made], limit: int) -> Exchanges | None:
    """Some of what rl tried, from its first to its last step."""
    items = []
    for m in made:
        kept = [line for line in m.json_lines("rollouts.jsonl") if not line.get("held_out")]
        step = max(1, len(kept) // max(1, limit))
        for rollout in kept[::step][:limit]:
            title = f"{rollout['task']}, step {rollout['step']}"
            items.append(Exchange(title, rollout["prompt"], [_rewarded(rollout, "reward")]))
    return Exchanges(items, f"{len(items)} rollouts of reinforcement learning") if items else None


def held_out(made: Sequence[Made], limit: int) -> Exchanges | None:
    """The same held-out problems at each evaluation of rl."""
    asked: dict[tuple[str, str], list[Answer]] = {}
    for m in made:
        for line in m.json_lines("rollouts.jsonl"):
            if line.get("held_out"):
                answer = _rewarded(line, f"step {line['step']}, reward")
                asked.setdefault((line["task"], line["prompt"]), []).append(answer)
    items = [Exchange(task, prompt, found) for (task, prompt), found in asked.items()][:limit]
    problems = plural(len(items), "held-out problem")
    return Exchanges(items, f"{problems} at each evaluation of reinforcement learning") if items else None


def _rewarded(line: dict[str, Any], label: str) -> Answer:
    return Answer(f"{label} {line['reward']:g}", parts(line["completion"]), line["reward"] > 0)
