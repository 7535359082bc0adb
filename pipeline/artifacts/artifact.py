"""A published folder and its manifest, artifact.json; and an exported folder and its marker, chatmill.json.

Both files may come from elsewhere and are checked where they are read.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.durable import read_json
from data.errors import DataError
from data.trust import check_name, check_sha256, check_size, fits, printable, shown
from pipeline.errors import Corrupt

RECORD = "artifact.json"
FORMAT = 2  # of artifacts in a store; it enters keys, so that those of another format are never taken for these

NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # of a module and a key, which become names of folders
REQUIRED = ("key", "module", "stages", "finished", "files")
# Optional fields of a manifest, with their defaults, which also give the types.
OPTIONAL: dict[str, Any] = {
    "inputs": {},
    "metrics": {},
    "run": "",
    "recipe": "",
    "device": "",
    "started": 0.0,
    "seconds": 0.0,
    "usd": 0.0,
    "nproc": 1,
}
MARKER = "chatmill.json"  # of a folder that `export` wrote
LATEST = 1e11  # seconds; later times have no calendar date


@dataclass(frozen=True)
class Artifact:
    """A published folder. `record` is its artifact.json, checked by `read`."""

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
        """Names of the stages that made or used it, the first maker first."""
        return list(self.record["stages"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.record.get("metrics") or {})

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.record["files"].values())


def read(folder: Path) -> Artifact | None:
    """The artifact in `folder`; None where there is no manifest.

    Raises Corrupt for a manifest that cannot be read, or whose names and values must not be used, and for a file in
    the folder's place.
    """
    where = folder / RECORD
    try:
        return Artifact(folder, checked(json.loads(where.read_bytes()), str(where)))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise Corrupt(f"{folder} is a file, expected the folder of an artifact") from None
    except IsADirectoryError:
        raise Corrupt(f"{where} is a directory") from None
    except (ValueError, RecursionError, DataError) as error:
        raise Corrupt(f"{where} cannot be read ({error})") from None


def checked(record: Any, where: str) -> dict[str, Any]:
    """The manifest with optional fields filled in. Raises ValueError, DataError for one that must not be used."""
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, expected an object")
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    record = OPTIONAL | {name: value for name, value in record.items() if value is not None or name not in OPTIONAL}
    for name, usual in OPTIONAL.items():
        _check_type(name, record[name], usual)
    _check_type("finished", record["finished"], 0.0)
    for value in (record["module"], record["key"], *record["inputs"].values()):
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise ValueError(f"{shown(value)} is not the name of a module or a key")
    if not isinstance(record["stages"], list) or not record["stages"]:
        raise ValueError("it names no stage")
    for stage in record["stages"]:
        _check_type("stages", stage, "")
    _check_code(record.get("code"))
    _check_files(record["files"], where)
    return record


def _check_type(name: str, value: Any, usual: Any) -> None:
    good = fits(value, usual)
    if good and isinstance(usual, (int, float)):
        good = 0 <= value < LATEST
    elif good and isinstance(usual, str):
        good = printable(value, keep="") == value
    if not good:
        raise ValueError(f"its {name} is {shown(value)}")


def _check_code(code: Any) -> None:
    if code is not None and not (isinstance(code, dict) and all(isinstance(parts, dict) for parts in code.values())):
        raise ValueError("its code is not an object of objects")


def _check_files(files: Any, where: str) -> None:
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError("it does not say what its files are")
    for name, entry in files.items():
        check_name(name, where)
        check_size(entry.get("bytes"), where)
        check_sha256(entry.get("sha256"), where)


@dataclass(frozen=True)
class Exported:
    """The origin of an exported model, and the names of the files that the export wrote."""

    format: str
    module: str
    key: str
    stages: list[str]
    files: list[str] = field(default_factory=list)


def read_marker(folder: Path) -> Exported | None:
    """The content of the marker in `folder`; None if there is none, or if it must not be trusted."""
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
