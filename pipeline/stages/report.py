"""What a run made, as a page to read and to pass on: report.html, report.md with img/, and summary.json.

Reads   evaluations, and every other stage it should tell about
Writes  report.html (nothing outside of it is needed), report.md, img/*.svg, summary.json
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.job import Job
from pipeline.report import as_html, as_markdown
from pipeline.report.made import evaluations, read
from pipeline.report.scores import headline, summary_rows
from pipeline.report.sections import report
from pipeline.typed import Natural

SUMMARY = "summary.json"


@dataclass
class Params:
    title: str = ""  # empty: after the recipe
    notes: list[str] = field(default_factory=list)  # below the results: what the data really are, for example
    samples: Natural = 6  # continuations, and answers to the same questions
    talks: Natural = 2  # graded questions of each task


def main(job: Job[Params]) -> dict[str, Any]:
    """The same artifacts give the same files. Returns the scores of the last stage that was evaluated."""
    params = job.params
    made = read(job.inputs, job.context.get("stages"))
    tested = evaluations(made)
    written = report(made, params.title, params.notes, params.samples, params.talks)
    (job.out / "img").mkdir(exist_ok=True)
    for figure in written.figures():
        (job.out / "img" / f"{figure.name}.svg").write_text(figure.svg)
    (job.out / "report.html").write_text(as_html.render(written))
    (job.out / "report.md").write_text(as_markdown.render(written))
    (job.out / SUMMARY).write_text(json.dumps(summary_rows(tested), indent=1, ensure_ascii=False) + "\n")
    return headline(tested)


def summary(folder: Path) -> list[list[str]]:
    """The results of the report in `folder` as a short table, header first; empty when nothing was evaluated."""
    return [list(row) for row in json.loads((folder / SUMMARY).read_text())]
