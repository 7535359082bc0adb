"""What a reader must know before trusting a number, found in the artifacts themselves."""

from collections.abc import Sequence
from typing import Any

from pipeline.report.made import Made, evaluations, trainings
from pipeline.report.words import count, listed, plural

UNFINISHED = 0.05  # a smaller part of the answers that were cut off is not worth a word


def notices(made: Sequence[Made]) -> list[str]:
    tested = evaluations(made)
    found = [line for m in tested for line in _of_core(m)]
    results = [(m.short, name, r) for m in tested for name, r in (m.results.get("chat") or {}).items()]
    if cropped := _by_task([(name, r["cropped"], r["items"]) for _, name, r in results if r.get("cropped")]):
        found.append(f"Questions longer than the context, cropped at their beginning: {cropped}.")
    unfinished = [(stage, (name, r["unfinished"], r["items"])) for stage, name, r in results if _many_unfinished(r)]
    if unfinished:
        after = listed(list(dict.fromkeys(stage for stage, _ in unfinished)))
        numbers = _by_task([counted for _, counted in unfinished])
        found.append(f"Answers cut off at the longest allowed length, after {after}: {numbers}.")
    found += [f"{name} was not run after {stage}: {r['refused']}" for stage, name, r in results if "refused" in r]
    forgeable = list(dict.fromkeys(name for _, name, r in results if r.get("advisory")))
    if forgeable:
        found.append(
            f"Advisory: programs of {listed(forgeable)} reported their own verdicts, and can pass without being right."
        )
    for m in tested:
        if lacks := m.results.get("sandbox_lacks"):
            found.append(f"{m.stage}: model-written programs ran without full isolation (sandbox=weak): {lacks}.")
    for m in made:
        found += _of_overlap(m) + _of_rows(m)
    for m in trainings(made):
        if skipped := m.metrics.get("skipped_steps"):
            found.append(f"{m.stage}: {plural(skipped, 'step')} skipped, with no target to train on.")
        if dropped := m.metrics.get("dropped_steps"):
            found.append(f"{m.stage}: {plural(dropped, 'step')} dropped for gradients far above the usual.")
    return found


def _many_unfinished(result: dict[str, Any]) -> bool:
    return result.get("unfinished", 0) > UNFINISHED * result.get("items", 0)


def _by_task(counted: list[tuple[str, int, int]]) -> str:
    """GSM8K 49 to 60 of 64, MMLU 18 of 64: over all stages, from (task, number, items)."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for name, number, items in counted:
        numbers.setdefault((name, items), []).append(number)
    parts = []
    for (name, items), found in numbers.items():
        low, high = min(found), max(found)
        parts.append(f"{name} {low:,}{f' to {high:,}' if high > low else ''} of {items:,}")
    return ", ".join(parts)


def _of_core(made: Made) -> list[str]:
    core = made.results.get("core") or {}
    if not core.get("cropped"):
        return []
    part = f"{core['cropped']:,} of {core['items']:,} CORE items"
    return [f"{made.stage}: {part} are longer than the context and were cropped at their beginning."]


def _of_overlap(made: Made) -> list[str]:
    """Evaluation items in the training data, a line for each kind of data."""
    by_source: dict[str, list[tuple[str, int, int]]] = {}
    for name, task in (made.file("overlap.json").get("tasks") or {}).items():
        for source, number in task["found"].items():
            by_source.setdefault(source, []).append((name, number, task["items"]))
    what = "Evaluation questions are in the training data (four fifths of their n-grams)"
    return [f"{what}, in that of {source}: {_by_task(counted)}." for source, counted in by_source.items()]


def _of_rows(made: Made) -> list[str]:
    rows = made.file("rows.json")
    lost = [f"{count(rows[name])} {name}" for name in ("dropped", "cut") if rows.get(name)]
    if not lost:
        return []
    total = rows["conversations"] + rows.get("dropped", 0)
    return [f"{made.stage}: of {count(total)} conversations, {listed(lost)} for length or form."]
