"""Scores by stage, and what a reader must know before trusting them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.numbers import count, listed, percent, plural
from pipeline.report.made import Made, evaluations, trainings

OVERALL = ("val bpb", "CORE", "ChatCORE")  # what such metrics are called, or how their names begin
CHATCORE_TASKS = 6
# Items of the public test sets, to tell when only some of them were asked.
FULL_SIZE = {"ARC-Easy": 2376, "ARC-Challenge": 1172, "MMLU": 14042, "GSM8K": 1319, "HumanEval": 164}
UNFINISHED = 0.05  # a smaller part of the answers that were cut off is not worth a warning


@dataclass(frozen=True)
class Score:
    """A metric of one stage, as a cell of a table. detail: in small print. better: what to compare by."""

    text: str
    detail: str = ""
    better: float | None = None
    items: int | None = None
    strong: bool = False  # the best of several


def scores(tested: Sequence[Made]) -> dict[str, dict[str, Score]]:
    """By metric, then by stage: validation loss, CORE, ChatCORE, then tasks in the order in which they first appear."""
    found: dict[str, dict[str, Score]] = {}
    for made in tested:
        for name, score in _scores(made.results):
            found.setdefault(name, {})[made.short] = score
    for by_stage in found.values():
        values = {score.better for score in by_stage.values() if score.better is not None}
        if len(values) > 1:
            best = max(values)
            by_stage |= {stage: replace(s, strong=True) for stage, s in by_stage.items() if s.better == best}
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith(OVERALL)))


def _scores(results: dict[str, Any]) -> Iterator[tuple[str, Score]]:
    if bpb := (results.get("bpb") or {}).get("val"):
        yield "val bpb", Score(f"{bpb:.4f}", better=-bpb)
    if core := results.get("core"):
        # Fewer than all tasks are never called CORE.
        name = "CORE" if core["tasks"] == core["of"] else f"CORE-{core['tasks']}/{core['of']}"
        yield name, Score(f"{core['score']:.4f}", better=core["score"], items=core["items"])
    if (chatcore := results.get("chatcore")) is not None:
        tasks = results.get("chatcore_tasks", CHATCORE_TASKS)
        name = "ChatCORE" if tasks == CHATCORE_TASKS else f"ChatCORE-{tasks}/{CHATCORE_TASKS}"
        yield name, Score(f"{chatcore:.4f}", better=chatcore)
    for name, result in (results.get("chat") or {}).items():
        items = result.get("items")
        if "accuracy" not in result:
            yield name, Score("not run", items=items)
            continue
        yield name, Score(percent(result["accuracy"]), interval(result["ci"]), result["accuracy"], items)
        for measure, value in result.items():
            if measure.startswith("pass@"):
                yield f"{name} {measure}", Score(percent(value), interval(result.get("pass_ci")), value, items)


def interval(bounds: Sequence[float] | None) -> str:
    """Empty for results of older code that were accepted, which may have none."""
    return "" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def item_counts(counts: Iterable[int | None]) -> str:
    """1,000 / 2,000: each number once."""
    return " / ".join(f"{number:,}" for number in sorted({number for number in counts if number is not None}))


def headline(tested: Sequence[Made]) -> dict[str, Any]:
    """The scores of the last stage that was evaluated, by name; what a sweep compares."""
    last = scores(tested[-1:])
    return {name: abs(s.better) for name, by in last.items() for s in by.values() if s.better is not None}


def footnotes(tested: Sequence[Made]) -> list[str]:
    """Where a name promises more than was measured."""
    notes = []
    cores = [made for made in tested if made.results.get("core")]
    if any(made.results["core"]["tasks"] < made.results["core"]["of"] for made in cores):
        notes.append("CORE-n/22 is the mean over n of CORE's 22 tasks and cannot be compared with CORE.")
    settings = [(made.record.get("params") or {}).get("core") or {} for made in cores]
    if limits := [int(core["max_per_task"]) for core in settings if core.get("max_per_task")]:
        notes.append(f"CORE uses at most {min(limits)} items of each task: a quick estimate, not the benchmark.")
    asked: dict[str, int] = {}
    for made in tested:
        for name, result in (made.results.get("chat") or {}).items():
            asked[name] = max(asked.get(name, 0), int(result.get("items", 0)))
    partial = [f"{name} ({n:,} of {FULL_SIZE[name]:,})" for name, n in asked.items() if n < FULL_SIZE.get(name, 0)]
    if partial:
        notes.append(f"Only a part of the public test set: {', '.join(partial)}.")
    return notes


def not_contaminated(made: Sequence[Made]) -> list[str]:
    """A note that the training data was searched for evaluation text in vain; `warnings` tell of what was found."""
    looked = [result for m in made if (result := m.file("contamination.json"))]
    tasks = [task for result in looked for task in result["tasks"].values()]
    if not any(task["checked"] for task in tasks) or any(task["found"] for task in tasks):
        return []
    tokens = count(sum(sum(result["sources"].values()) for result in looked))
    found = f"no evaluation question has four fifths of its {looked[0]['ngram']}-grams in {tokens} training tokens."
    return [f"Contamination check: {found}"]


def warnings(made: Sequence[Made]) -> list[str]:
    """What a reader must know before trusting a number, found in the artifacts themselves."""
    tested = evaluations(made)
    found = []
    for m in tested:
        core = m.results.get("core") or {}
        if core.get("cropped"):
            part = f"{core['cropped']:,} of {core['items']:,} CORE items"
            found.append(f"{m.stage}: {part} are longer than the context and were cropped at the beginning.")
    results = [(m.short, name, r) for m in tested for name, r in (m.results.get("chat") or {}).items()]
    if cropped := [(name, r["cropped"], r["items"]) for _, name, r in results if r.get("cropped")]:
        found.append(f"Questions longer than the context, cropped at the beginning: {_by_task(cropped)}.")
    if unfinished := [x for x in results if x[2].get("unfinished", 0) > UNFINISHED * x[2].get("items", 0)]:
        after = listed(list(dict.fromkeys(stage for stage, _, _ in unfinished)))
        by_task = _by_task([(name, r["unfinished"], r["items"]) for _, name, r in unfinished])
        found.append(f"Answers that reached the length limit and were cut off, after {after}: {by_task}.")
    for m in tested:
        if left_out := m.results.get("left_out"):
            found.append(f"{m.stage}: {listed(left_out)} left out, because of programs=skip.")
    if advisory := list(dict.fromkeys(name for _, name, r in results if r.get("advisory"))):
        found.append(f"Advisory: programs of {listed(advisory)} report their own verdicts, so wrong ones can pass.")
    for m in tested:
        if weakness := m.results.get("sandbox_weakness"):
            found.append(f"{m.stage}: model-written programs ran without full isolation (sandbox=weak): {weakness}.")
    for m in made:
        found += [*_contamination(m), *_lost_conversations(m)]
    for m in trainings(made):
        if skipped := m.metrics.get("empty_steps"):
            found.append(f"{m.stage}: skipped {plural(skipped, 'step')} that had no target to train on.")
        if dropped := m.metrics.get("dropped_steps"):
            found.append(f"{m.stage}: dropped {plural(dropped, 'step')} because of unusually large gradients.")
    return found


def _by_task(counted: list[tuple[str, int, int]]) -> str:
    """GSM8K 49 to 60 of 64, MMLU 18 of 64: over all stages, from (task, number, items)."""
    found: dict[tuple[str, int], list[int]] = {}
    for name, number, of in counted:
        found.setdefault((name, of), []).append(number)
    parts = []
    for (name, of), amounts in found.items():
        low, high = min(amounts), max(amounts)
        parts.append(f"{name} {low:,}{f' to {high:,}' if high > low else ''} of {of:,}")
    return ", ".join(parts)


def _contamination(made: Made) -> list[str]:
    """Evaluation items in the training data, a line for each kind of data."""
    by_source: dict[str, list[tuple[str, int, int]]] = {}
    for name, task in (made.file("contamination.json").get("tasks") or {}).items():
        for source, number in task["found"].items():
            by_source.setdefault(source, []).append((name, number, task["items"]))
    what = "Contamination: evaluation questions are in the training data (four fifths of their n-grams)"
    return [f"{what}, in that of {source}: {_by_task(counted)}." for source, counted in by_source.items()]


def _lost_conversations(made: Made) -> list[str]:
    rows = made.file("rows.json")
    lost = [f"{count(rows[name])} {name}" for name in ("dropped", "cut") if rows.get(name)]
    if not lost:
        return []
    total = count(rows["conversations"] + rows.get("dropped", 0))
    return [f"{made.stage}: of {total} conversations, {listed(lost)} because of their length or format."]
