"""The artifacts a report tells about, read from their folders."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.artifact import read as read_artifact

EVALUATE = "evaluate_"
TRAINED = ("pretrain", "finetune", "rl")  # modules that leave a model


@dataclass(frozen=True)
class Made:
    """One artifact under the name of the stage that made it. `record` is its artifact.json; folder: if it is read."""

    stage: str
    folder: Path | None
    record: Mapping[str, Any]

    @property
    def module(self) -> str:
        return str(self.record["module"])

    @property
    def key(self) -> str:
        return str(self.record["key"])

    @property
    def inputs(self) -> dict[str, str]:
        return dict(self.record.get("inputs") or {})

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.record.get("metrics") or {})

    @property
    def seconds(self) -> float:
        return float(self.record.get("seconds") or 0.0)

    @property
    def usd(self) -> float:
        return float(self.record.get("usd") or 0.0)

    @property
    def short(self) -> str:
        """base for evaluate_base, else the stage's name."""
        return self.stage.removeprefix(EVALUATE)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl"""
        return self.json_lines("metrics.jsonl")

    def file(self, name: str) -> dict[str, Any]:
        """A JSON file of the artifact; empty where there is none."""
        with suppress(ValueError):
            return dict(json.loads(self._text(name) or "{}"))
        return {}

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """A file of one JSON object a line, without lines that a crash cut off."""
        lines = []
        for line in self._text(name).splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def _text(self, name: str) -> str:
        with suppress(OSError):
            return (self.folder / name).read_text() if self.folder else ""
        return ""

    @cached_property
    def results(self) -> dict[str, Any]:
        return self.file("results.json")


def read(inputs: Mapping[str, Path], others: Mapping[str, Mapping[str, Any]] | None = None) -> list[Made]:
    """One Made for each input folder, makers before readers, else in the order given.

    others: records by stage name of what stands behind the inputs and is not read itself; known by its record alone.
    """
    found = []
    for name, folder in inputs.items():
        artifact = read_artifact(folder)
        assert artifact is not None
        record, names = artifact.record, artifact.stages
        found.append(Made(name if name in names else names[0], folder, record))
    keys = {made.key for made in found}
    found += [Made(name, None, record) for name, record in (others or {}).items() if record["key"] not in keys]
    return in_order(found)


def in_order(found: Iterable[Made]) -> list[Made]:
    """Makers before readers; of those that do not depend on each other, an evaluation right after its model."""
    waiting, done = list(found), []
    placed: set[str] = set()
    keys = {made.key for made in waiting}
    while waiting:
        free = [m for m in waiting if not (set(m.inputs.values()) & keys - placed)] or waiting
        chosen = next((m for m in free if m.module == "evaluate"), free[0])
        waiting.remove(chosen)
        placed.add(chosen.key)
        done.append(chosen)
    return done


def evaluations(made: Iterable[Made]) -> list[Made]:
    return [m for m in made if m.module == "evaluate" and m.results]


def trainings(made: Iterable[Made]) -> list[Made]:
    return [m for m in made if m.module in TRAINED]
