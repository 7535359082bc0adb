"""Artifacts on disk: published whole or not at all, known by key, verified before they are read.

artifacts/MODULE/KEY/  published: the files and artifact.json, which alone makes a folder an artifact
work/MODULE-KEY/       being made; survives a crash and is what a resume continues
quarantine/            what was found damaged, with the reason
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import Corrupt, UserError

RESULT_NEUTRAL = "stores what was made"

RECORD = "artifact.json"
VERIFIED = "verified.json"
OWN_FILES = {RECORD, VERIFIED, "_prefect.json"}


@dataclass(frozen=True)
class Artifact:
    """A published folder. `record` is its artifact.json."""

    folder: Path
    record: dict[str, Any]

    @property
    def key(self) -> str:
        return str(self.record["key"])

    @property
    def module(self) -> str:
        return str(self.record["module"])

    @property
    def stages(self) -> list[str]:
        """Names of the stages it was made or used for, the first maker first."""
        return list(self.record["stages"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.record.get("metrics") or {})

    @property
    def remade(self) -> float:
        """When it, or something behind it, was last made again for what it lacked; 0 when never."""
        return float(self.record.get("remade") or 0.0)

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.record["files"].values())


class Store:
    def __init__(self, root: Path, reverify_days: float = 30.0):
        self.root = root.resolve()
        self.reverify_seconds = reverify_days * 86400

    @cached_property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def folder(self, module: str, key: str) -> Path:
        return self.artifacts / _short(module) / key

    def work(self, module: str, key: str) -> Path:
        return self.root / "work" / f"{_short(module)}-{key}"

    def lock_path(self, module: str, key: str) -> Path:
        return self.root / "locks" / f"{_short(module)}-{key}.lock"

    # --- finding

    def find(self, module: str, key: str) -> Artifact | None:
        """The artifact, if published and its files are there with their sizes. Raises Corrupt when they are not."""
        artifact = self.read(self.folder(module, key))
        if artifact:
            for name, entry in artifact.record["files"].items():
                try:
                    size = (artifact.folder / name).stat().st_size
                except OSError:
                    raise Corrupt(f"{artifact.folder / name} is missing") from None
                if size != entry["bytes"]:
                    raise Corrupt(f"{artifact.folder / name} has {size} bytes instead of {entry['bytes']}")
        return artifact

    @staticmethod
    def read(folder: Path) -> Artifact | None:
        """What artifact.json in `folder` says; None where there is none. Raises Corrupt when it cannot be read."""
        try:
            record = json.loads((folder / RECORD).read_bytes())
            if missing := {"key", "module", "stages", "finished"} - record.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            if not all({"bytes", "sha256"} <= entry.keys() for entry in record["files"].values()):
                raise ValueError("it does not say what its files are")
            return Artifact(folder, record)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{folder / RECORD} cannot be read ({error})") from None

    def all(self) -> Iterator[Artifact]:
        """Every readable artifact, newest first."""
        found = []
        for path in self.artifacts.glob(f"*/*/{RECORD}"):
            try:
                artifact = self.read(path.parent)
            except Corrupt:
                continue
            if artifact:
                found.append(artifact)
        yield from sorted(found, key=lambda a: a.record["finished"], reverse=True)

    def unreadable(self) -> list[tuple[Path, str]]:
        """Folders whose artifact.json cannot be read, with what is wrong."""
        found = []
        for path in sorted(self.artifacts.glob(f"*/*/{RECORD}")):
            try:
                self.read(path.parent)
            except Corrupt as error:
                found.append((path.parent, str(error)))
        return found

    # --- verifying

    def verify(self, artifact: Artifact, everything: bool = False) -> int:
        """Hash the files not verified lately; returns how many were hashed. Raises Corrupt at the first bad one.

        A file counts as verified while device, inode, size, mtime and ctime are what they were when it was hashed.
        """
        known = {} if everything else _read_json(artifact.folder / VERIFIED)
        due = [n for n in artifact.record["files"] if not self._verified(artifact.folder / n, known.get(n))]
        with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
            for name, found in zip(due, pool.map(lambda n: _state_and_sha256(artifact.folder / n), due)):
                state, sha256 = found
                if sha256 != artifact.record["files"][name]["sha256"]:
                    raise Corrupt(f"{artifact.folder / name} is not what was published (sha256 differs)")
                known[name] = {"state": state, "at": time.time()}
        if due:
            _write_json(artifact.folder / VERIFIED, known)
        return len(due)

    def _verified(self, path: Path, entry: dict[str, Any] | None) -> bool:
        return bool(entry and entry["state"] == _file_state(path) and time.time() - entry["at"] < self.reverify_seconds)

    # --- changing

    def publish(self, work: Path, record: dict[str, Any]) -> Artifact:
        """Make `work`/out the artifact that `record` describes; its log and measurements go with it. Atomic."""
        out = work / "out"
        for name in ("log.txt", "metrics.jsonl"):
            if (work / name).exists():
                os.replace(work / name, out / name)
        names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        names = [name for name in names if name not in OWN_FILES and not name.startswith(f"{RECORD}.")]
        with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
            hashed = dict(zip(names, pool.map(lambda n: _sync_and_hash(out / n), names)))
        record = record | {"files": {n: {"bytes": state[2], "sha256": sha} for n, (state, sha) in hashed.items()}}
        now = time.time()
        _write_json(out / VERIFIED, {n: {"state": state, "at": now} for n, (state, _) in hashed.items()})
        _write_json(out / RECORD, record, sync=True)
        folder = self.folder(record["module"], record["key"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            self.discard(folder)
        os.rename(out, folder)
        _sync_folder(folder.parent)
        shutil.rmtree(work, ignore_errors=True)
        return Artifact(folder, record)

    def note_use(self, artifact: Artifact, stage: str) -> None:
        """Remember that another stage name stands for the same artifact."""
        if stage not in artifact.record["stages"]:
            artifact.record["stages"].append(stage)
            _write_json(artifact.folder / RECORD, artifact.record, sync=True)

    def quarantine(self, folder: Path, reason: str) -> Path:
        """Move a damaged artifact out of the way, with the reason beside it."""
        target = self.root / "quarantine" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
        (target / "reason.txt").write_text(reason + "\n")
        return target

    def discard(self, folder: Path) -> None:
        """Delete an artifact; its marker first, so that half of it is never taken for the whole."""
        (folder / RECORD).unlink(missing_ok=True)
        trash = self.root / "trash" / f"{folder.name}-{time.time_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)

    # --- what is remembered beside artifacts

    def memory(self, name: str) -> dict[str, Any]:
        return _read_json(self.root / "memory" / f"{name}.json")

    def remember(self, name: str, content: dict[str, Any]) -> None:
        path = self.root / "memory" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, content)

    @contextmanager
    def memory_of(self, name: str) -> Iterator[dict[str, Any]]:
        """What is remembered, to be changed in place; others who change it wait, so that nothing gets lost."""
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with open(self.root / "locks" / f"memory-{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.memory(name)
            yield content
            self.remember(name, content)

    def accepted(self, module: str, key: str) -> str:
        """The key of the artifact that somebody declared equal to `key`, else `key` itself."""
        return str(_read_json(self._accept_path(module, key)).get("key", key))

    def accept(self, module: str, key: str, old: str, why: str) -> None:
        path = self._accept_path(module, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, {"key": old, "why": why, "at": time.time()}, sync=True)

    def _accept_path(self, module: str, key: str) -> Path:
        return self.root / "accepted" / f"{_short(module)}-{key}.json"

    def file_digest(self, path: str) -> str:
        """sha256 of a local file, remembered while its path, size and mtime stay the same. Raises UserError."""
        try:
            found = os.stat(path)
        except OSError:
            raise UserError("there is no such file", path) from None
        memory = self.memory("files")
        state = [found.st_size, found.st_mtime_ns]
        entry = memory.get(os.path.abspath(path))
        if not entry or entry["state"] != state:
            entry = {"state": state, "sha256": _state_and_sha256(Path(path))[1]}
            self.remember("files", self.memory("files") | {os.path.abspath(path): entry})
        return str(entry["sha256"])

    def find_by_name(self, name: str, modules: tuple[str, ...] = ()) -> Artifact:
        """What `name` stands for: a key or its first digits, MODULE/KEY, a stage (its newest), a run, or RUN/STAGE.

        modules: kinds of artifact to choose among; all when empty. Raises UserError when there is none.
        """
        run, _, stage = name.partition("/")
        tagged = self.memory("names").get(run, {})
        keys = [key for tag, (_, key) in tagged.items() if stage in ("", tag)]
        for artifact in self.all():
            if modules and artifact.module not in modules:
                continue
            tags = [*artifact.stages, f"{artifact.module}/{artifact.key}", artifact.record["run"]]
            if name in tags or artifact.key in keys or (len(name) >= 4 and artifact.key.startswith(name)):
                return artifact
        kind = f" of kind {' or '.join(modules)}" if modules else ""
        raise UserError(f"the store has nothing{kind} called {name!r}", str(self.root), "`ls` shows what there is.")


def _short(module: str) -> str:
    return module.rpartition(".")[2]


def _file_state(path: Path) -> list[int] | None:
    try:
        s = path.stat()
    except OSError:
        return None
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]


def _state_and_sha256(path: Path) -> tuple[list[int], str]:
    state = _file_state(path)
    if state is None:
        raise Corrupt(f"{path} is missing")
    with open(path, "rb") as file:
        return state, hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_hash(path: Path) -> tuple[list[int], str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _state_and_sha256(path)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_json(path: Path) -> dict[str, Any]:
    """A remembered mapping; what cannot be read is forgotten rather than trusted."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _write_json(path: Path, content: Any, sync: bool = False) -> None:
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1, default=_plain)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
