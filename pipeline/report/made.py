"""The artifacts that a report is about, read from their folders."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.artifacts.artifact import read as read_artifact

EVALUATE, DATASET = "evaluate_", "dataset/"  # how the names of such stages begin
DATASETS = "data sets"  # shown as one: there are many, and each is small
TRAINED = ("pretrain", "finetune", "rl")  # modules that make a model


@dataclass(frozen=True)
class Made:
    """An artifact under the name of the stage that made it. `folder` is None for one known by its record alone."""

    stage: str
    module: str
    key: str
    inputs: dict[str, str]
    metrics: dict[str, Any]
    record: Mapping[str, Any]  # artifact.json
    folder: Path | None

    @property
    def short(self) -> str:
        """base for evaluate_base, else the stage's name."""
        return self.stage.removeprefix(EVALUATE)

    @cached_property
    def results(self) -> dict[str, Any]:
        """What an evaluation found."""
        return self.file("results.json")

    def file(self, name: str) -> dict[str, Any]:
        """A JSON file of the artifact; empty where there is none."""
        with suppress(ValueError):
            return dict(json.loads(self._text(name) or "{}"))
        return {}

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """A file with one JSON object per line, without lines that a crash cut off."""
        lines = []
        for line in self._text(name).splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def _text(self, name: str) -> str:
        with suppress(OSError):
            return (self.folder / name).read_text() if self.folder else ""
        return ""


def read(inputs: Mapping[str, Path], others: Mapping[str, Mapping[str, Any]] | None = None) -> list[Made]:
    """One Made for each input folder, makers before readers, else in the given order.

    others: records by stage name of what is behind the inputs and is not read itself.
    """
    found = []
    for name, folder in inputs.items():
        artifact = read_artifact(folder)
        assert artifact is not None
        found.append(_made(name if name in artifact.stages else artifact.stages[0], artifact.record, folder))
    keys = {made.key for made in found}
    found += [_made(name, record) for name, record in (others or {}).items() if record["key"] not in keys]
    return _in_order(found)


def _made(stage: str, record: Mapping[str, Any], folder: Path | None = None) -> Made:
    return Made(stage, record["module"], record["key"], record["inputs"], record["metrics"], record, folder)


def _in_order(waiting: list[Made]) -> list[Made]:
    """Makers before readers; of those that do not depend on each other, an evaluation right after its model."""
    done: list[Made] = []
    while waiting:
        missing = {made.key for made in waiting}
        free = [made for made in waiting if missing.isdisjoint(made.inputs.values())] or waiting
        chosen = next((made for made in free if made.module == "evaluate"), free[0])
        waiting = [made for made in waiting if made is not chosen]
        done.append(chosen)
    return done


def evaluations(made: Iterable[Made]) -> list[Made]:
    return [m for m in made if m.module == "evaluate" and m.results]


def trainings(made: Iterable[Made]) -> list[Made]:
    return [m for m in made if m.module in TRAINED]
