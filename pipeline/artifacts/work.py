"""Unfinished work: the folders work/MODULE-KEY of a store, of which a run makes artifacts."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.durable import read_fields
from pipeline.artifacts.locks import is_held
from pipeline.artifacts.store import Artifact, Store
from pipeline.errors import UserError


@dataclass(frozen=True)
class Work:
    store: Store
    folder: Path

    @classmethod
    def all(cls, store: Store) -> "list[Work]":
        return [cls(store, folder) for folder in sorted((store.root / "work").glob("*"))]

    @classmethod
    def find(cls, store: Store, name: str, by_stage: bool = False) -> "Work | None":
        """The work of this key, or of a key that begins so. by_stage: else the newest of this stage.

        Raises UserError if several keys begin so.
        """
        works = sorted(cls.all(store), key=cls._changed_at, reverse=True)
        named = [w for w in works if name == w.name or (len(name) >= 4 and w.name.rpartition("-")[2].startswith(name))]
        if len(named) > 1:
            names = ", ".join(work.name for work in named)
            raise UserError(f"{name!r} matches several: {names}", str(store.root), "Give more of the key.")
        of_stage = [work for work in works if by_stage and work.job["stage"] == name]
        return next(iter(named + of_stage), None)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def job(self) -> dict[str, Any]:
        """Its stage, key and inputs, by job.json or else its name."""
        module, _, key = self.name.rpartition("-")
        return read_fields(self.folder / "job.json", {"stage": module, "key": key, "inputs": {}})

    @property
    def running(self) -> bool:
        """True if a process is making it now."""
        return is_held(self.store.root / "locks" / f"{self.name}.lock")

    def reads(self, artifact: Artifact) -> bool:
        return str(artifact.folder) in self.job["inputs"].values()

    def _changed_at(self) -> float:
        try:
            return self.folder.stat().st_mtime
        except FileNotFoundError:  # just published or removed
            return 0.0
