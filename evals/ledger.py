"""The measurements of an evaluation so far: they survive a kill, and ranks share them."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02


class Ledger:
    """Records by (group, item), appended to one file per rank in a folder that all ranks can read.

    Items are assigned by their number, so that ranks need not communicate: a rank measures those of its `share` that no
    earlier run recorded, and `wait` collects the records of all ranks.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.records: dict[str, dict[int, dict[str, Any]]] = {}
        self._read_to: dict[Path, int] = {}
        self._read()
        self._drop_torn_line()
        self._since = time.monotonic()
        self._lock = threading.Lock()

    @property
    def _own(self) -> Path:
        return self.folder / f"ledger.{self.rank}.jsonl"

    def share(self, group: str, count: int) -> list[int]:
        """The items of range(count) that this rank still has to measure."""
        self._since = time.monotonic()
        known = self.records.get(group, {})
        return [item for item in range(self.rank, count, self.world_size) if item not in known]

    def record(self, group: str, item: int, **values: Any) -> None:
        """Keep a measurement, from any thread; `seconds`, the time since the last one, is added."""
        with self._lock:
            now = time.monotonic()
            line = {"group": group, "item": item, "seconds": round(now - self._since, 4), **values}
            self._since = now
            with open(self._own, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.records.setdefault(group, {})[item] = line

    def wait(self, group: str, count: int, check: Callable[[], None]) -> list[dict[str, Any]]:
        """The records of range(count), in order, once all ranks have made them. check() may raise to stop waiting."""
        while len(self.records.get(group, {})) < count:
            check()
            time.sleep(_POLL_SECONDS)
            self._read()
        return [self.records[group][item] for item in range(count)]

    def seconds(self, records: Iterable[dict[str, Any]]) -> float:
        """Wall time of records, if ranks worked in parallel."""
        return sum(record["seconds"] for record in records) / self.world_size

    def _read(self) -> None:
        """Read the complete lines that were added; the last one may be cut off by a crash, or still being written."""
        for path in sorted(self.folder.glob("ledger.*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._read_to.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_to[path] = self._read_to.get(path, 0) + len(whole)
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # cut off by a full disk: it is measured again
                    record = json.loads(line)
                    self.records.setdefault(record["group"], {})[record["item"]] = record

    def _drop_torn_line(self) -> None:
        if self._own.exists():
            with open(self._own, "r+b") as file:
                file.truncate(self._read_to[self._own])
