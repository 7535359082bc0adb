"""Each metric by stage, as one table: the report's centre."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.document import Cell, Table
from pipeline.report.made import Made
from pipeline.report.words import duration, percent

MISSING = "-"

# Items of the public test sets, to say when only some of them were asked.
FULL_SIZE = {"ARC-Easy": 2376, "ARC-Challenge": 1172, "MMLU": 14042, "GSM8K": 1319, "HumanEval": 164}
CHATCORE_TASKS = 6


@dataclass(frozen=True)
class Score:
    """A metric of one stage. shown is how it is written; detail stands below it; better is what to compare by."""

    shown: str
    detail: str = ""
    better: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class Row:
    name: str
    scores: dict[str, Score]  # by stage


def rows(evaluations: Sequence[Made]) -> list[Row]:
    """Validation loss, CORE, ChatCORE, then the tasks in the order in which they first appear."""
    by_name: dict[str, dict[str, Score]] = {}
    for made in evaluations:
        for name, score in _scores(made.results).items():
            by_name.setdefault(name, {})[made.short] = score
    first = [name for name in by_name if name == "val bpb" or name.startswith(("CORE", "ChatCORE"))]
    rest = [name for name in by_name if name not in first]
    return [Row(name, by_name[name]) for name in first + rest]


def _scores(results: dict[str, Any]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    if bpb := (results.get("bpb") or {}).get("val"):
        found["val bpb"] = Score(f"{bpb:.4f}", "", -bpb)
    if core := results.get("core"):
        found[core_name(core)] = Score(f"{core['score']:.4f}", "", core["score"], core["items"])
    chat = results.get("chat") or {}
    if results.get("chatcore") is not None:
        measured = results.get("chatcore_tasks", CHATCORE_TASKS)
        name = "ChatCORE" if measured == CHATCORE_TASKS else f"ChatCORE-{measured}/{CHATCORE_TASKS}"
        found[name] = Score(f"{results['chatcore']:.4f}", "", results["chatcore"])
    for name, result in chat.items():
        found.update(_task_scores(name, result))
    return found


def _task_scores(name: str, result: dict[str, Any]) -> dict[str, Score]:
    if "accuracy" not in result:
        return {name: Score("not run", items=result.get("items"))}
    found = {name: Score(percent(result["accuracy"]), interval(result["ci"]), result["accuracy"], result["items"])}
    for key, value in result.items():
        if key.startswith("pass@"):
            found[f"{name} {key}"] = Score(percent(value), interval(result.get("pass_ci")), value, result["items"])
    return found


def interval(bounds: Sequence[float] | None) -> str:
    """Nothing for results of older code that were accepted, which may have none."""
    if bounds is None:
        return ""
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f}"


def core_name(core: dict[str, Any]) -> str:
    """Fewer than all tasks are never called CORE."""
    return "CORE" if core["tasks"] == core["of"] else f"CORE-{core['tasks']}/{core['of']}"


def score_table(evaluations: Sequence[Made], notes: list[str]) -> Table:
    stages = [made.short for made in evaluations]
    body: list[list[Cell | str]] = []
    for row in rows(evaluations):
        values = {score.better for score in row.scores.values() if score.better is not None}
        best = max(values) if len(values) > 1 else None
        line: list[Cell | str] = [row.name]
        for stage in stages:
            score = row.scores.get(stage)
            wins = score is not None and best is not None and score.better == best
            line.append(Cell(score.shown, score.detail, wins) if score else MISSING)
        body.append([*line, _items(row)])
    explained = ["Accuracies with their 95% Wilson interval. Bold: the best of the row."] if body else []
    return Table(["", *stages, "items"], body, notes=[*explained, *footnotes(evaluations), *notes])


def core_table(evaluations: Sequence[Made]) -> Table | None:
    """CORE's tasks one by one; None where no evaluation has them."""
    cores = {made.short: made.results["core"] for made in evaluations if made.results.get("core")}
    labels = dict.fromkeys(label for core in cores.values() for label in core.get("centered", {}))
    if not labels:
        return None
    body: list[list[Cell | str]] = []
    for label in labels:
        line: list[Cell | str] = [label]
        for core in cores.values():
            line += _core_cells(core, label)
        there = [core for core in cores.values() if label in core["centered"]]
        counts = sorted({core["counts"][label] for core in there})
        body.append([*line, percent(there[0]["baseline"][label]), " / ".join(f"{n:,}" for n in counts)])
    header = [name for stage in cores for name in (f"{stage}: accuracy", "centred", "time")]
    explained = "Centred: 0 is guessing, 1 is all right. CORE is their mean. Accuracies with their 95% Wilson interval."
    return Table(["", *header, "guessing", "items"], body, notes=[explained])


def _core_cells(core: dict[str, Any], label: str) -> list[Cell | str]:
    if label not in core["centered"]:
        return [MISSING] * 3
    accuracy = Cell(percent(core["accuracy"][label]), interval(core.get("ci", {}).get(label)))
    return [accuracy, f"{core['centered'][label]:.4f}", duration(core["seconds_by_task"][label])]


def _items(row: Row) -> str:
    counts = sorted({score.items for score in row.scores.values() if score.items is not None})
    return " / ".join(f"{n:,}" for n in counts)


def footnotes(evaluations: Sequence[Made]) -> list[str]:
    """Where a name promises more than was measured."""
    notes = []
    tested = [made for made in evaluations if made.results.get("core")]
    if any(made.results["core"]["tasks"] < made.results["core"]["of"] for made in tested):
        notes.append("CORE-n/22 is the mean over n of CORE's 22 tasks and cannot be compared with CORE.")
    settings = [(made.record.get("params") or {}).get("core") or {} for made in tested]
    limits = [int(core["max_per_task"]) for core in settings if core.get("max_per_task")]
    if limits:
        notes.append(f"CORE from at most {min(limits)} items of each task: a quick look, not the benchmark.")
    asked: dict[str, int] = {}
    for made in evaluations:
        for name, result in (made.results.get("chat") or {}).items():
            asked[name] = max(asked.get(name, 0), int(result.get("items", 0)))
    partial = [f"{name} ({n:,} of {FULL_SIZE[name]:,})" for name, n in asked.items() if n < FULL_SIZE.get(name, 0)]
    if partial:
        notes.append(f"Not the whole public test set: {', '.join(partial)}.")
    return notes


def headline(evaluations: Sequence[Made]) -> dict[str, Any]:
    """The scores of the last stage that was evaluated, by name; what a sweep compares."""
    if not evaluations:
        return {}
    last = evaluations[-1]
    return {row.name: abs(s.better) for row in rows([last]) for s in row.scores.values() if s.better is not None}


def summary_rows(evaluations: Sequence[Made]) -> list[list[str]]:
    """The table in plain text, header first: what the terminal shows at the end of a run."""
    stages = [made.short for made in evaluations]
    lines = [["", *stages, "items"]]
    for row in rows(evaluations):
        lines.append([row.name, *(row.scores[s].shown if s in row.scores else MISSING for s in stages), _items(row)])
    return lines if len(lines) > 1 else []
