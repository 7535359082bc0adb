"""What a reader must know before trusting a number, found in the artifacts themselves."""

from collections.abc import Sequence

from pipeline.report.made import Made, evaluations, trainings
from pipeline.report.words import count, listed, plural


def notices(made: Sequence[Made]) -> list[str]:
    found = []
    for m in evaluations(made):
        found += _of_evaluation(m)
    weak = [m.stage for m in made if (m.results.get("sandbox") or _sandbox(m)) == "weak" and _runs_programs(m)]
    if weak:
        found.append(f"Model-written programs ran without full isolation (sandbox=weak) in {listed(weak)}.")
    for m in made:
        found += _of_rows(m)
    for m in trainings(made):
        if skipped := m.metrics.get("skipped_steps"):
            found.append(f"{m.stage}: {plural(skipped, 'step')} skipped because gradients overflowed.")
    return list(dict.fromkeys(found))


def _sandbox(made: Made) -> str | None:
    return (made.record.get("launch") or {}).get("sandbox")


def _runs_programs(made: Made) -> bool:
    return any("HumanEval" in name for name in made.results.get("chat") or {})


def _of_evaluation(made: Made) -> list[str]:
    found = []
    core = made.results.get("core") or {}
    if core.get("cropped"):
        found.append(
            f"{made.stage}: {core['cropped']:,} of {core['items']:,} CORE items are longer than the context and were "
            "cropped at their beginning."
        )
    for name, result in (made.results.get("chat") or {}).items():
        if "refused" in result:
            found.append(f"{made.stage}: {name} was not run: {result['refused']}")
        if result.get("cropped"):
            cut = plural(result["cropped"], "question")
            found.append(f"{made.stage}: {cut} of {name} were cropped to the context.")
        if result.get("unfinished", 0) > result.get("items", 0) // 20:
            found.append(
                f"{made.stage}: {result['unfinished']:,} of {result['items']:,} answers to {name} were cut off at the "
                "longest allowed length."
            )
    if overlap := made.results.get("overlap"):
        found += [f"{made.stage}: {line}" for line in overlap]
    return found


def _of_rows(made: Made) -> list[str]:
    rows = made.file("rows.json")
    lost = [f"{count(rows[name])} {name}" for name in ("dropped", "cut") if rows.get(name)]
    if not lost:
        return []
    total = rows["conversations"] + rows.get("dropped", 0)
    return [f"{made.stage}: of {count(total)} conversations, {listed(lost)} for length or form."]
