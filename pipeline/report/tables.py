"""The tables of a report, and its numbers at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.numbers import MISSING, count, day, duration, listed, money, number, percent
from pipeline.report.made import DATASET, DATASETS, Made, evaluations, trainings
from pipeline.report.scores import Score, footnotes, interval, item_counts, scores

CARDS = 6  # numbers at a glance; more do not fit in one line


@dataclass(frozen=True)
class Table:
    """The first column names the row and is aligned to the left; `left` more columns are too. `notes` are below it."""

    header: list[str]
    rows: list[list[Score | str]]
    left: int = 0
    notes: list[str] = field(default_factory=list)
    total: bool = False  # the last row sums up the others


def at_a_glance(made: Sequence[Made]) -> list[tuple[str, str]]:
    """A few numbers that stand out, with what they are: totals, then the first of the scores."""
    facts = [("time of all stages", _seconds(made)), ("cost", _usd(made))]
    if models := [m.metrics["params"] for m in trainings(made) if m.metrics.get("params")]:
        facts.append(("parameters", count(models[-1])))
    if tokens := sum(m.metrics.get("tokens") or 0 for m in made if m.module == "pretrain"):
        facts.append(("pretraining tokens", count(tokens)))
    for name, by_stage in list(scores(evaluations(made)).items())[: CARDS - len(facts)]:
        stage = list(by_stage)[0 if name == "val bpb" else -1]
        facts.append((f"{name}, {stage}", by_stage[stage].text))
    return facts


def score_table(tested: Sequence[Made], notes: list[str]) -> Table:
    """Each metric by stage: the centre of a report."""
    stages = [made.short for made in tested]
    body: list[list[Score | str]] = []
    for name, by_stage in scores(tested).items():
        items = item_counts(score.items for score in by_stage.values())
        body.append([name, *(by_stage.get(stage, MISSING) for stage in stages), items])
    explained = ["Accuracies have 95% Wilson intervals. The best score of each row is bold."] if body else []
    return Table(["", *stages, "items"], body, notes=[*explained, *footnotes(tested), *notes])


def summary(tested: Sequence[Made]) -> list[list[str]]:
    """The scores in plain text, header first; empty without scores. The terminal shows it at the end of a run."""
    table = score_table(tested, [])
    rows = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows]
    return [table.header, *rows] if rows else []


def core_table(tested: Sequence[Made]) -> Table | None:
    """CORE's tasks one by one; None where no evaluation has them."""
    cores = {made.short: made.results["core"] for made in tested if (made.results.get("core") or {}).get("centered")}
    body: list[list[Score | str]] = []
    for label in dict.fromkeys(label for core in cores.values() for label in core["centered"]):
        line: list[Score | str] = [label]
        for core in cores.values():
            if label in core["centered"]:
                accuracy = Score(percent(core["accuracy"][label]), interval(core.get("ci", {}).get(label)))
                line += [accuracy, f"{core['centered'][label]:.4f}", duration(core["seconds_by_task"][label])]
            else:
                line += [MISSING] * 3
        there = [core for core in cores.values() if label in core["centered"]]
        body.append([*line, percent(there[0]["baseline"][label]), item_counts(core["counts"][label] for core in there)])
    header = [name for stage in cores for name in (f"{stage}: accuracy", "centred", "time")]
    note = "Centred: 0 is guessing, 1 is all correct. CORE is the mean of these. Accuracies have 95% Wilson intervals."
    return Table(["", *header, "guessing", "items"], body, notes=[note]) if body else None


def stage_table(made: Sequence[Made]) -> Table:
    """Where each stage ran, how long and for how much."""
    datasets = [m for m in made if m.stage.startswith(DATASET)]
    groups = [(f"{DATASETS} ({len(datasets)})", datasets)] if datasets else []
    groups += [(m.stage, [m]) for m in made if m not in datasets]
    body: list[list[Score | str]] = []
    for name, group in groups:
        finished = max(m.record["finished"] for m in group)
        body.append([name, _device(group[0]), day(finished), _seconds(group), _usd(group)])
    body.append(["total", "", "", _seconds(made), _usd(made)])
    return Table(["stage", "device", "finished", "time", "cost"], body, left=2, total=True, notes=_cost_notes(made))


def _seconds(made: Sequence[Made]) -> str:
    return duration(sum(m.record["seconds"] for m in made))


def _usd(made: Sequence[Made]) -> str:
    return money(sum(m.record["usd"] for m in made))


def _device(made: Made) -> str:
    device, number = made.record["device"] or "cpu", made.record["nproc"]
    name = "CPU" if device == "cpu" else device
    return name if number == 1 else f"{number} x {name}"


def _cost_notes(made: Sequence[Made]) -> list[str]:
    rates = sorted({(m.record.get("launch") or {}).get("usd_per_hour", 0.0) for m in made})
    shown = listed([money(rate) for rate in rates])
    notes = [f"Costs are at {shown} per hour (launch.usd_per_hour). Cached stages count as in the run that made them."]
    known = {m.key for m in made}
    uncounted = {DATASETS if n.startswith(DATASET) else n for m in made for n, k in m.inputs.items() if k not in known}
    if uncounted:
        notes.append(f"Not counted, because this report does not read them: {listed(sorted(uncounted))}.")
    if again := [m.stage for m in made if (m.record.get("attempts") or 1) > 1]:
        notes.append(f"Resumed after an interruption: {listed(again)}. Their time is the sum of all attempts.")
    return notes


def machines(made: Sequence[Made]) -> list[str]:
    """One line for each machine that took part."""
    by_machine: dict[str, list[str]] = {}
    for m in made:
        machine, torch = m.record.get("machine") or {}, (m.record.get("versions") or {}).get("torch")
        parts = [machine.get("cpu"), f"{machine.get('cores', '?')} cores"]
        parts += [machine.get("gpus") and f"{machine['gpus']} GPUs", machine.get("system")]
        parts += [f"Python {machine.get('python', '?')}", torch and f"torch {torch}"]
        by_machine.setdefault(", ".join(str(part) for part in parts if part), []).append(m.stage)
    if len({line.split(", Python")[0] for line in by_machine}) == 1:  # the longest also has a version of torch
        return [f"Machine: {max(by_machine, key=len)}."]
    return [f"{listed(stages)}: {line}." for line, stages in by_machine.items()]


def training_table(made: Sequence[Made]) -> Table | None:
    body: list[list[Score | str]] = []
    for stage, metrics in ((m.stage, m.metrics) for m in trainings(made)):
        if "steps" in metrics:
            speed = [number(metrics.get("tok_s")), percent(metrics.get("mfu")), duration(metrics.get("train_seconds"))]
            last = [number(metrics.get("loss"), 4), str(metrics.get("dtype") or MISSING)]
            body.append([stage, number(metrics["steps"]), count(metrics.get("tokens")), *speed, *last])
    header = ["stage", "steps", "tokens", "tokens/s", "MFU", "training", "last loss", "dtype"]
    note = (
        "Tokens/s and MFU are over all training steps, without evaluation and saving. MFU is of the device's peak rate."
    )
    return Table(header, body, notes=[note]) if body else None


def tokenizer_tables(made: Sequence[Made]) -> list[Table]:
    """How well each tokenizer compresses text, beside well-known ones."""
    tables = []
    for m in made:
        evaluation = m.file("evaluation.json")
        if m.module != "tokenizer" or not evaluation:
            continue
        body: list[list[Score | str]] = []
        for name, value in evaluation["bytes_per_token"].items():
            shown = f"not measured: {value['skipped']}" if isinstance(value, dict) else f"{value:.3f}"
            body.append([f"this one ({m.metrics.get('vocab_size', 0):,} tokens)" if name == "this" else name, shown])
        held_out = evaluation.get("held_out") or {}
        size = f"{held_out.get('documents', 0):,} held-out documents, {count(held_out.get('bytes', 0))} bytes"
        tables.append(Table(["tokenizer", "bytes per token"], body, notes=[f"On {size}. More is better."]))
    return tables


def artifact_table(made: Sequence[Made]) -> Table:
    """Every artifact by name, with its key and when it was made, and what was only read, with its key."""
    rows: list[list[Score | str]] = []
    for m in made:
        git = str(m.record.get("git") or "")[:10] + ("+" if m.record.get("dirty_diff") else "")
        rows.append([m.stage, f"{m.module}/{m.key}", day(m.record["finished"]), git or MISSING])
    known = {m.key for m in made}
    read = {key: name for m in made for name, key in m.inputs.items() if key not in known}
    rows += [[name, key, "", ""] for key, name in sorted(read.items(), key=lambda item: item[1])]
    changed = any(m.record.get("dirty_diff") for m in made)
    notes = ["A + after a commit: made with changes that were not committed."] if changed else []
    return Table(["artifact", "key", "made", "commit"], rows, left=3, notes=notes)
