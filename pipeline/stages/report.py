"""What a run made, as a page to read and to pass on: report.html, report.md with img/, and summary.json.

Reads   evaluations, and every other stage it should tell about
Writes  report.html (nothing outside of it is needed), report.md, img/*.svg, summary.json
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.checks import Natural
from pipeline.job import Job
from pipeline.numbers import day, listed
from pipeline.report import pictures, tables
from pipeline.report.made import evaluations, read, trainings
from pipeline.report.render import render, sources
from pipeline.report.samples import samples
from pipeline.report.scores import headline, not_contaminated, warnings

SUMMARY = "summary.json"


@dataclass
class Params:
    title: str = ""  # empty: after the recipe
    notes: list[str] = field(default_factory=list)  # below the results: what the data really are, for example
    samples: Natural = 6  # continuations, and answers to the same questions
    talks: Natural = 2  # graded questions of each task


def data_identity(params: Params, memory: dict[str, Any], online: bool) -> dict[str, Any]:
    """The templates, which decide what is written as much as code does."""
    return {"files": sources()}


def main(job: Job[Params]) -> dict[str, Any]:
    """The same artifacts give the same files. Returns the scores of the last stage that was evaluated."""
    params = job.params
    made = read(job.inputs, job.context.get("stages"))
    tested = evaluations(made)
    recipes = listed(sorted({m.record["recipe"] for m in made if m.record["recipe"]}))
    content: dict[str, Any] = {
        "title": params.title or (f"Training report: {recipes}" if recipes else "Training report"),
        "finished": day(max((m.record["finished"] for m in made), default=0.0)),
        "facts": tables.at_a_glance(made),
        "warnings": warnings(made),
        "scores": tables.score_table(tested, [*not_contaminated(made), *params.notes]) if tested else None,
        "accuracies": pictures.accuracies(tested),
        "core": tables.core_table(tested),
        "machines": tables.machines(made),
        "stages": tables.stage_table(made),
        "training": tables.training_table(made),
        "curves": [picture for m in trainings(made) if (picture := pictures.curves(m))],
        "tokenizers": tables.tokenizer_tables(made),
        "samples": samples(made, params.samples, params.talks),
        "lineage": pictures.lineage(made),
        "artifacts": tables.artifact_table(made) if made else None,
    }
    (job.out / "img").mkdir(exist_ok=True)
    for picture in filter(None, [content["accuracies"], *content["curves"], content["lineage"]]):
        (job.out / "img" / f"{picture.name}.svg").write_text(picture.svg)
    for name in ("report.html", "report.md"):
        (job.out / name).write_text(render(name, **content))
    (job.out / SUMMARY).write_text(json.dumps(tables.summary(tested), indent=1, ensure_ascii=False) + "\n")
    return headline(tested)


def summary(folder: Path) -> list[list[str]]:
    """The results of the report in `folder` as a short table, header first; empty when nothing was evaluated."""
    return [list(row) for row in json.loads((folder / SUMMARY).read_text())]
