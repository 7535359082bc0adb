"""Artifacts on disk: published whole or not at all, known by key, verified before they are read.

artifacts/MODULE/KEY/  published: the files and artifact.json, which alone makes a folder an artifact
work/MODULE-KEY/       being made; survives a crash and is what a resume continues
quarantine/            what was found damaged, with the reason
format.json            the format of the artifacts
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from data.durable import file_sha256, keep_json, read_json, sync
from data.trust import shown
from pipeline.artifacts.artifact import FORMAT, NAME, RECORD, Artifact, checked, read
from pipeline.artifacts.memory import Memory
from pipeline.errors import Corrupt, UserError

VERIFIED = "verified.json"
FORMAT_FILE = "format.json"
OWN_FILES = {RECORD, VERIFIED, "_prefect.json"}


class Store:
    def __init__(self, root: Path, reverify_days: float = 30.0):
        self.root = root.resolve()
        self.reverify_seconds = reverify_days * 86400

    @cached_property
    def memory(self) -> Memory:
        return Memory(self.root)

    @cached_property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def folder(self, module: str, key: str) -> Path:
        """Raises Corrupt for names that lead elsewhere, since they may come from a file."""
        if any("/" in name or name == ".." for name in (module, key)):
            raise Corrupt(f"{shown(f'{module}/{key}')} is not the name of an artifact")
        return self.artifacts / _short(module) / key

    def work(self, module: str, key: str) -> Path:
        return self.root / "work" / f"{_short(module)}-{key}"

    def lock_path(self, module: str, key: str) -> Path:
        return self.root / "locks" / f"{_short(module)}-{key}.lock"

    # --- format

    @property
    def format(self) -> int:
        """The format of the newest artifacts; 1 if no file says so."""
        found = (read_json(self.root / FORMAT_FILE, dict) or {}).get("format")
        return found if isinstance(found, int) else 1

    def check_format(self) -> None:
        """Raise UserError for a store of a newer version, whose artifacts this one would misread."""
        if self.format > FORMAT:
            fix = "Update Chatmill, or choose another store with store.root=FOLDER."
            raise UserError(f"is of format {self.format}, and this version reads {FORMAT}", str(self.root), fix)

    def format_note(self) -> str:
        """A note about artifacts that an earlier version made. Empty if there are none, or newer ones as well."""
        if self.format >= FORMAT or not any(self.artifacts.glob(f"*/*/{RECORD}")):
            return ""
        return (
            f"An earlier version of Chatmill made the artifacts in {self.root}. They stay, and those that this run "
            "needs are made again."
        )

    # --- finding

    def find(self, module: str, key: str) -> Artifact | None:
        """The artifact, if published and its files are there with their sizes. Raises Corrupt when they are not."""
        artifact = self._in_place(self.folder(module, key))
        if artifact:
            for name, entry in artifact.record["files"].items():
                try:
                    size = (artifact.folder / name).stat().st_size
                except OSError:
                    raise Corrupt(f"{artifact.folder / name} is missing") from None
                if size != entry["bytes"]:
                    raise Corrupt(f"{artifact.folder / name} has {size} bytes instead of {entry['bytes']}")
        return artifact

    read = staticmethod(read)

    @staticmethod
    def _in_place(folder: Path) -> Artifact | None:
        """As `read`, for a folder of this store, whose name must match its manifest."""
        artifact = read(folder)
        if artifact and (artifact.module, artifact.key) != (folder.parent.name, folder.name):
            raise Corrupt(f"{folder / RECORD} belongs to {artifact.module}/{artifact.key}")
        return artifact

    def all(self) -> Iterator[Artifact]:
        """All readable artifacts, newest first."""
        found = [artifact for _, artifact in self._everything() if isinstance(artifact, Artifact)]
        yield from sorted(found, key=lambda a: a.record["finished"], reverse=True)

    def unreadable(self) -> list[tuple[Path, str]]:
        """Folders and files in place of artifacts that cannot be read, with the reasons."""
        return [(folder, error) for folder, error in self._everything() if isinstance(error, str)]

    def _everything(self) -> Iterator[tuple[Path, Artifact | str | None]]:
        for folder in sorted(self.artifacts.glob("*/*")):
            if NAME.fullmatch(folder.name):
                try:
                    yield folder, self._in_place(folder)
                except Corrupt as error:
                    yield folder, str(error)

    def find_by_name(self, name: str, modules: tuple[str, ...] = ()) -> Artifact:
        """The newest artifact of that name: a key or its first digits, MODULE/KEY, a stage, a run, or RUN/STAGE.

        modules: the kinds of artifact to choose from; all if empty. Raises UserError if there is none.
        """
        run, _, stage = name.partition("/")
        tagged = self.memory.named().get(run, {})
        keys = [key for tag, (_, key) in tagged.items() if stage in ("", tag)]
        for artifact in self.all():
            if modules and artifact.module not in modules:
                continue
            tags = [*artifact.stages, f"{artifact.module}/{artifact.key}", artifact.record["run"]]
            if name in tags or artifact.key in keys or (len(name) >= 4 and artifact.key.startswith(name)):
                return artifact
        kind = f" of kind {' or '.join(modules)}" if modules else ""
        raise UserError(f"the store has nothing{kind} called {name!r}", str(self.root), "Run `ls` to see what it has.")

    # --- verifying

    def open(self, artifact: Artifact, *names: str) -> Path:
        """The artifact's folder, for reading, after `verify`. All readers of artifacts call this first.

        names: the files that will be read; all if empty. A damaged artifact goes to quarantine where that can be
        written, and Corrupt says how to make it again.
        """
        try:
            self.verify(artifact, names=names)
            return artifact.folder
        except Corrupt as error:
            ours = artifact.folder == self.folder(artifact.module, artifact.key)
            told = self.set_aside(artifact.folder, error.what) if ours else error.what
            raise Corrupt(told, _again(artifact)) from None

    def set_aside(self, folder: Path, error: str) -> str:
        """Move what is damaged to quarantine, if possible. Returns a message for the user."""
        with suppress(OSError):
            self.quarantine(folder, error)
            return f"{error}; moved to quarantine"
        return error

    def verify(self, artifact: Artifact, everything: bool = False, names: Iterable[str] = ()) -> int:
        """Hash the files not verified recently. Returns how many were hashed. Raises Corrupt at the first bad one.

        A file counts as verified while device, inode, size, mtime and ctime are the same as when it was hashed.
        names: the files to verify; all if empty.
        """
        files = artifact.record["files"]
        known = {} if everything else read_json(artifact.folder / VERIFIED, dict) or {}
        due = [n for n in names or files if n in files and not self._verified(artifact.folder / n, known.get(n))]
        with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
            for name, found in zip(due, pool.map(lambda n: _state_and_sha256(artifact.folder / n), due)):
                state, sha256 = found
                if sha256 != files[name]["sha256"]:
                    raise Corrupt(f"{artifact.folder / name} is not what was published (sha256 differs)")
                known[name] = {"state": state, "at": time.time()}
        if due:
            with suppress(OSError):  # read-only or full: hashed again the next time
                keep_json(artifact.folder / VERIFIED, known)
        return len(due)

    def _verified(self, path: Path, entry: Any) -> bool:
        if not isinstance(entry, dict) or not isinstance(at := entry.get("at"), (int, float)):
            return False
        state = _file_state(path)
        return state is not None and entry.get("state") == state and abs(time.time() - at) < self.reverify_seconds

    # --- changing

    def publish(self, work: Path, record: dict[str, Any]) -> Artifact:
        """Turn `work`/out into the artifact that `record` describes, with its log and measurements. Atomic."""
        out = work / "out"
        for name in ("log.txt", "metrics.jsonl"):
            if (work / name).exists():
                os.replace(work / name, out / name)
        names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        names = [name for name in names if name not in OWN_FILES and not name.startswith(f"{RECORD}.")]
        with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
            hashed = dict(zip(names, pool.map(lambda n: _sync_and_hash(out / n), names)))
        record = record | {"files": {n: {"bytes": state[2], "sha256": sha} for n, (state, sha) in hashed.items()}}
        record = checked(record, str(out))
        now = time.time()
        keep_json(out / VERIFIED, {n: {"state": state, "at": now} for n, (state, _) in hashed.items()})
        keep_json(out / RECORD, record, _plain)
        if self.format < FORMAT:
            keep_json(self.root / FORMAT_FILE, {"format": FORMAT})
        folder = self.folder(record["module"], record["key"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            self.discard(folder)
        os.rename(out, folder)
        sync(folder.parent)
        shutil.rmtree(work, ignore_errors=True)
        return Artifact(folder, record)

    def note_use(self, artifact: Artifact, stage: str) -> None:
        """Record that another stage uses the same artifact."""
        if stage not in artifact.record["stages"]:
            artifact.record["stages"].append(stage)
            keep_json(artifact.folder / RECORD, artifact.record, _plain)

    def quarantine(self, folder: Path, reason: str) -> Path:
        """Move a damaged artifact, or a file in its place, out of the way, with the reason beside it."""
        target = self.root / "quarantine" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
        reasons = target / "reason.txt" if target.is_dir() else target.with_suffix(".reason.txt")
        with suppress(OSError):  # on a full disk, moving it matters more than the reason
            reasons.write_text(reason + "\n")
        return target

    def discard(self, folder: Path) -> None:
        """Delete an artifact, its manifest first, so that a partial one is never taken for a whole one."""
        (folder / RECORD).unlink(missing_ok=True)
        trash = self.root / "trash" / f"{folder.name}-{time.time_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _again(artifact: Artifact) -> str:
    recipe = f" recipe={artifact.record['recipe']}" if artifact.record.get("recipe") else ""
    return f"Run `python flows.py{recipe} until={artifact.stages[0]}`, with the settings of its run, to make it again."


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
    try:
        if state is not None:
            return state, file_sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except IsADirectoryError:
        raise Corrupt(f"{path} is a directory") from None
    raise Corrupt(f"{path} is missing")


def _sync_and_hash(path: Path) -> tuple[list[int], str]:
    sync(path)
    return _state_and_sha256(path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
