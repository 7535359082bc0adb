"""The sections of a report, from the artifacts it tells about."""

from collections.abc import Sequence
from typing import Any

from pipeline.report import charts, lineage, speech
from pipeline.report.document import Block, Cell, Facts, Notices, Paragraph, Report, Section, Table
from pipeline.report.lineage import DATASET, DATASETS
from pipeline.report.made import Made, evaluations, trainings
from pipeline.report.notices import notices
from pipeline.report.scores import core_table, rows, score_table
from pipeline.report.words import count, day, duration, listed, money, percent

CARDS = 6  # numbers at a glance; more do not fit in one line


def report(made: Sequence[Made], title: str, notes: list[str], samples: int, talks: int) -> Report:
    """samples: of each kind; talks: graded questions of each task."""
    finished = max((m.record.get("finished") or 0.0 for m in made), default=0.0)
    recipes = listed(sorted({str(m.record["recipe"]) for m in made if m.record.get("recipe")}))
    name = title or (f"Training report: {recipes}" if recipes else "Training report")
    sections = [
        Section("At a glance", glance(made)),
        Section("Results", results(made, notes)),
        Section("CORE by task", [table] if (table := core_table(evaluations(made))) else []),
        Section("What ran", what_ran(made)),
        Section("Training", training(made)),
        Section("Tokenizer", tokenizer(made)),
        Section("Samples", said(made, samples, talks)),
        Section("Lineage", lines(made)),
    ]
    return Report(name, day(finished), [section for section in sections if section.blocks])


def glance(made: Sequence[Made]) -> list[Block]:
    facts = [("time, all stages", duration(sum(m.seconds for m in made)))]
    facts.append(("cost", money(sum(m.usd for m in made))))
    models = [m for m in trainings(made) if m.metrics.get("params")]
    if models:
        facts.append(("parameters", count(models[-1].metrics["params"])))
    tokens = sum(m.metrics.get("tokens") or 0 for m in trainings(made) if m.module == "pretrain")
    if tokens:
        facts.append(("tokens of pretraining", count(tokens)))
    tested = evaluations(made)
    facts += _main_scores(tested, CARDS - len(facts))
    warnings = notices(made)
    return [Facts(facts), *([Notices(warnings)] if warnings else [])]


def _main_scores(tested: Sequence[Made], number: int) -> list[tuple[str, str]]:
    """So many scores: those over many tasks, each of the last stage that has it, then single tasks."""
    table = rows(tested)
    chosen = [row for row in table if row.name.startswith(("val", "CORE", "ChatCORE"))]
    chosen += [row for row in table if row not in chosen]
    found = []
    for row in chosen[:number]:
        stage = next(iter(row.scores)) if row.name.startswith("val") else list(row.scores)[-1]
        found.append((f"{row.name}, {stage}", row.scores[stage].shown))
    return found


def results(made: Sequence[Made], notes: list[str]) -> list[Block]:
    tested = evaluations(made)
    if not tested:
        return []
    figure = charts.accuracies(tested)
    return [score_table(tested, [*clean(made), *notes]), *([figure] if figure else [])]


def clean(made: Sequence[Made]) -> list[str]:
    """That evaluation text was looked for in the training data and not found; where it was, a notice says so."""
    looked = [found for m in made if (found := m.file("overlap.json"))]
    tasks = [task for found in looked for task in found["tasks"].values()]
    if not any(task["checked"] for task in tasks) or any(task["found"] for task in tasks):
        return []
    tokens = count(sum(sum(found["sources"].values()) for found in looked))
    return [f"No evaluation question has four fifths of its {looked[0]['ngram']}-grams in {tokens} training tokens."]


def what_ran(made: Sequence[Made]) -> list[Block]:
    datasets = [m for m in made if m.stage.startswith(DATASET)]
    body: list[list[Cell | str]] = []
    if datasets:
        body.append(_ran(f"{DATASETS} ({len(datasets)})", datasets))
    body += [_ran(m.stage, [m]) for m in made if m not in datasets]
    body.append(["in all", "", "", duration(sum(m.seconds for m in made)), money(sum(m.usd for m in made))])
    table = Table(["stage", "on", "finished", "time", "cost"], body, left=2, total=True, notes=_usual_costs(made))
    return [*[Paragraph(text) for text in machines(made)], table]


def _ran(name: str, made: Sequence[Made]) -> list[Cell | str]:
    finished = max(m.record.get("finished") or 0.0 for m in made)
    return [
        name,
        where(made[0]),
        day(finished),
        duration(sum(m.seconds for m in made)),
        money(sum(m.usd for m in made)),
    ]


def _usual_costs(made: Sequence[Made]) -> list[str]:
    """Where costs come from."""
    rates = sorted({(m.record.get("launch") or {}).get("usd_per_hour", 0.0) for m in made})
    shown = listed([money(rate) for rate in rates])
    again = [m.stage for m in made if (m.record.get("attempts") or 1) > 1]
    notes = [f"Costs at {shown} an hour (launch.usd_per_hour). A stage taken from the store is shown as it was made."]
    known = {m.key for m in made}
    uncounted = {DATASETS if n.startswith(DATASET) else n for m in made for n, k in m.inputs.items() if k not in known}
    if uncounted:
        notes.append(f"Not counted, as this report does not read them: {listed(sorted(uncounted))}.")
    if again:
        notes.append(f"Resumed after an interruption: {listed(again)}; their time is the sum of all attempts.")
    return notes


def where(made: Made) -> str:
    device = str(made.record.get("device") or "cpu")
    number = int(made.record.get("nproc") or 1)
    name = "CPU" if device == "cpu" else device
    return name if number == 1 else f"{number} x {name}"


def machines(made: Sequence[Made]) -> list[str]:
    """One line for each machine that took part."""
    by_machine: dict[str, list[Made]] = {}
    for m in made:
        machine = m.record.get("machine") or {}
        parts = [str(machine.get("cpu") or ""), f"{machine.get('cores', '?')} cores"]
        parts += [f"{machine['gpus']} GPUs"] if machine.get("gpus") else []
        parts += [str(machine.get("system") or ""), f"Python {machine.get('python', '?')}", _versions(m, "torch")]
        by_machine.setdefault(", ".join(part for part in parts if part), []).append(m)
    single = len({line.split(", Python")[0] for line in by_machine}) == 1
    if single:
        longest = max(by_machine, key=len, default="")
        return [f"Machine: {longest}."] if longest else []
    return [f"{listed([m.stage for m in who])}: {line}." for line, who in by_machine.items()]


def _versions(made: Made, *names: str) -> str:
    versions = made.record.get("versions") or {}
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def training(made: Sequence[Made]) -> list[Block]:
    blocks: list[Block] = []
    if table := throughput(made):
        blocks.append(table)
    for m in trainings(made):
        if figure := charts.curves(m):
            blocks.append(figure)
    return blocks


def throughput(made: Sequence[Made]) -> Table | None:
    body: list[list[Cell | str]] = []
    for m in trainings(made):
        metrics = m.metrics
        if "steps" not in metrics:
            continue
        rate = metrics.get("tok_s")
        body.append(
            [
                m.stage,
                f"{metrics['steps']:,}",
                _or_missing(metrics.get("tokens"), count),
                _or_missing(rate, lambda value: f"{value:,.0f}"),
                _or_missing(metrics.get("mfu"), percent),
                _or_missing(metrics.get("train_seconds"), duration),
                _or_missing(metrics.get("loss"), lambda value: f"{value:.4f}"),
                str(metrics.get("dtype") or "-"),
            ]
        )
    if not body:
        return None
    header = ["stage", "steps", "tokens", "tokens/s", "MFU", "training", "last loss", "dtype"]
    note = "Tokens/s and MFU over all training steps, without evaluating and saving. MFU: of the device's peak rate."
    return Table(header, body, notes=[note])


def _or_missing(value: Any, show: Any) -> str:
    return "-" if value is None else str(show(value))


def tokenizer(made: Sequence[Made]) -> list[Block]:
    blocks: list[Block] = []
    for m in made:
        evaluation = m.file("evaluation.json")
        if m.module != "tokenizer" or not evaluation:
            continue
        own = f"this one ({m.metrics.get('vocab_size', 0):,} tokens)"
        body: list[list[Cell | str]] = []
        for name, value in evaluation["bytes_per_token"].items():
            skipped = isinstance(value, dict)
            body.append(
                [own if name == "this" else name, f"not measured: {value['skipped']}" if skipped else f"{value:.3f}"]
            )
        held = evaluation.get("held_out") or {}
        note = (
            f"On {held.get('documents', 0):,} held-out documents, {count(held.get('bytes', 0))} bytes. More is better."
        )
        blocks.append(Table(["tokenizer", "bytes a token"], body, notes=[note]))
    return blocks


def said(made: Sequence[Made], samples: int, talks: int) -> list[Block]:
    blocks = [
        speech.continuations(made, samples),
        speech.answers(made, samples),
        speech.graded(made, talks),
        speech.held_out(made, samples),
        speech.rollouts(made, samples),
    ]
    return [block for block in blocks if block]


def lines(made: Sequence[Made]) -> list[Block]:
    if not made:
        return []
    figure = lineage.lineage_figure(made)
    return [*([figure] if figure else []), lineage.lineage_table(made)]
