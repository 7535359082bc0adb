"""The marker that `export` leaves in a folder: what it was made from, and which files are its own."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable import read_json, write_json
from data.errors import DataError
from data.trust import check_name
from pipeline.artifacts.artifact import NAME

MARKER = "chatmill.json"
CONFIG = "config.json"  # nothing loads a folder without it


@dataclass(frozen=True)
class Exported:
    """The origin of an exported model, and the names of the files that the export wrote."""

    format: str
    module: str
    key: str
    stages: list[str]
    files: list[str] = field(default_factory=list)


def read_marker(folder: Path) -> Exported | None:
    """The content of the marker in `folder`; None if there is none, or it must not be trusted."""
    record = read_json(folder / MARKER, dict)
    try:
        found = Exported(**(record or {}))
        for name in found.files:
            check_name(name, str(folder / MARKER))
    except (TypeError, DataError):
        return None
    texts = (found.format, found.module, found.key, *found.stages)
    if not all(isinstance(text, str) for text in texts) or not found.stages or not found.files:
        return None
    return found if NAME.fullmatch(f"{found.module}{found.key}") or not found.module else None


def put(made: Path, target: Path, record: Exported) -> None:
    """Move the files in `made` to `target`, replacing those of an earlier export; other files stay as they are.

    If this is cut off, the folder cannot be loaded, as config.json comes last, and its marker still lists our files.
    """
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    earlier = read_marker(target)
    old = earlier.files if earlier else []
    target.mkdir(parents=True, exist_ok=True)
    write_marker(target, record, {*old, *names})
    (target / CONFIG).unlink(missing_ok=True)
    for name in set(old) - set(names):
        _remove(target, name)
    for name in sorted(names, key=lambda name: name == CONFIG):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, target / name)
    write_marker(target, record, names)


def write_marker(folder: Path, record: Exported, files: set[str] | list[str]) -> None:
    write_json(folder / MARKER, asdict(record) | {"files": sorted(files)})


def _remove(folder: Path, name: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty: other files are in it
        while (path := path.parent) != folder:
            path.rmdir()
