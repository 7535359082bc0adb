"""Facts that a store remembers beside its artifacts. None is required: what cannot be read is forgotten, not trusted,
and a full or read-only disk stops nothing.

memory/NAME.json                what is known about names, data sources and local files
accepted/MODULE-KEY.json        artifacts that the user accepted as equal after a change of code
"""

import copy
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.durable import file_sha256, keep_json, read_fields, read_json
from data.trust import is_sha256
from pipeline.artifacts.artifact import NAME
from pipeline.errors import UserError


@dataclass(frozen=True)
class Memory:
    """writes: True if new facts are kept."""

    root: Path
    writes: bool = True

    def unwritten(self) -> "Memory":
        """The same memory, for commands that write nothing."""
        return replace(self, writes=False)

    def recall(self, name: str) -> dict[str, Any]:
        return read_json(self._path(name), dict) or {}

    def remember(self, name: str, content: dict[str, Any]) -> None:
        if self.writes:
            with suppress(OSError):
                keep_json(self._path(name), content)

    @contextmanager
    def changing(self, name: str) -> Iterator[dict[str, Any]]:
        """The remembered content, to be changed in place; others who change it wait, so that nothing gets lost.

        Raises OSError where it cannot be kept.
        """
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / f"memory-{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.recall(name)
            yield content
            keep_json(self._path(name), content)

    def named(self) -> dict[str, dict[str, tuple[str, str]]]:
        """{run.name: {stage: (module, key)}}"""
        return {
            name: {stage: (made[0], made[1]) for stage, made in stages.items() if _is_place(made)}
            for name, stages in self.recall("names").items()
            if isinstance(stages, dict)
        }

    def name(self, name: str, made: dict[str, tuple[str, str]]) -> None:
        """Remember which artifacts, {stage: (module, key)}, the run of that name made or found.

        Raises OSError where it cannot be kept.
        """
        with self.changing("names") as names:
            known = names[name] if isinstance(names.get(name), dict) else {}
            names[name] = known | {stage: list(place) for stage, place in made.items()}

    def data_identity(self, look: Callable[[dict[str, Any]], Any], hub: dict[str, Any], fresh: bool) -> Any:
        """The result of `look`, which is passed what is known about data, and adds to it.

        hub: also passed, and not remembered. fresh: pass nothing known.
        """
        known = {kind: entries for kind, entries in self.recall("identity").items() if isinstance(entries, dict)}
        memory = copy.deepcopy({} if fresh else known) | hub
        found = look(memory)
        learnt = {kind: known.get(kind, {}) | entries for kind, entries in memory.items() if kind not in hub}
        if known | learnt != known:
            self.remember("identity", known | learnt)
        return found

    def accepted(self, module: str, key: str) -> str:
        """The key of the artifact that was accepted for `key`, else `key` itself."""
        found = read_fields(self._accept_path(module, key), {"key": key})["key"]
        return str(found) if NAME.fullmatch(found) else key

    def accept(self, module: str, key: str, old: str, why: str) -> None:
        keep_json(self._accept_path(module, key), {"key": old, "why": why, "at": time.time()})

    def _accept_path(self, module: str, key: str) -> Path:
        return self.root / "accepted" / f"{module.rpartition('.')[2]}-{key}.json"

    def file_digest(self, path: str) -> str:
        """sha256 of a local file, remembered while its path, size and mtime stay the same. Raises UserError."""
        try:
            found = os.stat(path)
        except OSError:
            raise UserError("there is no such file", path) from None
        name, state = os.path.abspath(path), [found.st_size, found.st_mtime_ns]
        entry = self.recall("files").get(name)
        if isinstance(entry, dict) and entry.get("state") == state and is_sha256(entry.get("sha256")):
            return str(entry["sha256"])
        sha256 = file_sha256(Path(path))
        self.remember("files", self.recall("files") | {name: {"state": state, "sha256": sha256}})
        return sha256

    def _path(self, name: str) -> Path:
        return self.root / "memory" / f"{name}.json"


def _is_place(made: Any) -> bool:
    return isinstance(made, list) and len(made) == 2 and all(isinstance(n, str) and NAME.fullmatch(n) for n in made)
