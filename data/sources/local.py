"""Text of your own: parquet, jsonl or txt files, the latter two also as .gz or .zst, and folders of them.

In a folder, hidden files and those about a data set (LICENSE, README) are not training text. If `val_shard` names one
of the files, each file is a shard. Otherwise documents are written to shards of even size, and a fraction of them,
chosen by their own text, is held out.
"""

import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from data.durable import file_sha256, link
from data.errors import DataMistake
from data.sources.source import Made, Request
from data.text.files import ABOUT, READ, counted, kind_of, open_shard, read_text, write_shard
from data.text.resplit import VAL, Resplit
from data.trust import described, group, printable

VAL_FRACTION = 0.01  # of the documents
CHECKED_CHARS = 64_000_000  # checked per file while planning, which takes about a second; the stage checks the rest
NAMED = 5  # ignored files that are named; the rest are counted
NOT_TEXT = "hidden files, LICENSE, README, COPYING and NOTICE"


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any]:
    """{"files": {name: {"sha256", "bytes"}}, "source": {"paths": {name: path}, "ignored": [path]}}; needs no network.
    Raises DataError.
    """
    found, ignored = find_sources(params.paths)
    files = _describe(found, params.column if params.what == "text" else None, group(memory, "local"))
    paths = {name: str(path) for name, path in found.items()}
    return {"files": files, "source": {"paths": paths, "ignored": [str(path) for path in ignored]}}


def make(request: Request) -> Made | None:
    """Write shards with the column `text` to `out`; of a data set, the files as they are."""
    params = request.params
    found = {name: Path(path) for name, path in request.identity["source"]["paths"].items()}
    for name, path in found.items():
        if file_sha256(path) != request.identity["files"][name]["sha256"]:
            raise DataMistake(f"{path}: has changed since this run was planned. Run again.")
    if ignored := request.identity["source"].get("ignored"):
        named = ", ".join(PurePosixPath(path).name for path in ignored[:NAMED]) + ", ..." * (len(ignored) > NAMED)
        line = f"files ignored: {len(ignored):,} ({named}). Supported: {READ}, except {NOT_TEXT}."
        request.say(printable(line, keep=""))
    if params.what == "dataset":
        for name, path in found.items():
            link(request.blobs.path(request.blobs.add(path)), request.out / name)
        return Made(list(found))
    if params.val_shard is not None:
        return _file_by_file(found, request)
    return _resplit(found, request)


def find_sources(paths: list[str]) -> tuple[dict[str, Path], list[Path]]:
    """The files in `paths` (files or folders), by their name below the given folder, in name order; and the files in
    folders that are ignored.

    Raises DataError for a path that does not exist or is of another kind, and for two files of one name.
    """
    if not paths:
        raise DataMistake("data.paths: names no file. Set files or folders of parquet, jsonl or txt.")
    found: dict[str, Path] = {}
    ignored: list[Path] = []
    for text in paths:
        path = Path(os.path.expanduser(text)).resolve()
        if not path.exists():
            raise DataMistake(f"{path}: there is no such file or folder (data.paths).")
        files = {path.name: path}
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files = {file.relative_to(path).as_posix(): file for file in inside if _is_text(file.relative_to(path))}
            ignored += [file for file in inside if not _is_text(file.relative_to(path))]
        if not files:
            raise DataMistake(f"{path}: holds no {READ} file (data.paths).")
        for name, file in files.items():
            if kind_of(file) is None:
                raise DataMistake(f"{file}: is not a {READ} file (data.paths).")
            if name in found:
                raise DataMistake(f"{file} and {found[name]}: have one name in the data set. Rename one of them.")
            found[name] = file
    return dict(sorted(found.items())), ignored


def _is_text(path: Path) -> bool:
    """Return True for a file in a folder that is training text by its name; `path` is relative to the folder."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not ABOUT.match(path.name) and kind_of(path) is not None


def _describe(sources: dict[str, Path], column: str | None, memory: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "bytes"}} of the sources; `memory` keeps digests by path, size and time of change.

    A file that is not in `memory` is read as text up to CHECKED_CHARS, unless column is None, which finds most mistakes
    while planning. Raises DataError.
    """
    files = {}
    for name, path in sources.items():
        stat = path.stat()
        seen = memory.get(str(path))
        state = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "column": column}
        if seen is None or not described(seen) or seen | state != seen:
            if column is not None:
                chars = 0
                for text in read_text(path, column):
                    chars += len(text)
                    if chars > CHECKED_CHARS:
                        break
            seen = memory[str(path)] = state | {"sha256": file_sha256(path)}
        files[name] = {"sha256": seen["sha256"], "bytes": seen["bytes"]}
    return files


def _file_by_file(found: dict[str, Path], request: Request) -> Made | None:
    """Write each file as one shard: parquet as it is, the others converted."""
    params = request.params
    shards: dict[str, str] = {}
    for name in found:
        shard = str(PurePosixPath(name).with_suffix(".parquet")).replace("/", "--")  # of a.txt.gz: a.txt.parquet
        if shard in shards:
            raise DataMistake(f"{found[name]} and {found[shards[shard]]}: would both be {shard}. Rename one of them.")
        shards[shard] = name
    val = next((shard for shard, name in shards.items() if params.val_shard in (shard, name)), None)
    if val is None:
        raise DataMistake(f"data.val_shard: {params.val_shard} is none of {', '.join(found)}.")
    train = [shard for shard in shards if shard != val][: params.train_shards]
    if len(train) < (params.train_shards or 1):
        raise DataMistake(f"data.train_shards: is {params.train_shards}, but there are {len(train)} beside {val}.")
    wanted = [*train, val] if params.validation else train
    for i, shard in enumerate(wanted):
        if request.should_stop():
            return None
        path, target = found[shards[shard]], request.out / shard
        if kind_of(path) == (".parquet", None):
            open_shard(path, params.column)
            link(request.blobs.path(request.blobs.add(path)), target)
        elif not target.exists():
            notes: Counter[str] = Counter()
            write_shard(target, read_text(path, params.column, notes), params.column)
            _say(path, notes, request)
        request.on_progress(i + 1, len(wanted))
    return Made(train, val if params.validation else None)


def _resplit(found: dict[str, Path], request: Request) -> Made | None:
    params = request.params
    work = Resplit(
        sources=list(found.values()),
        column=params.column,
        shard_chars=params.shard_chars,
        val_fraction=VAL_FRACTION if params.val_fraction is None else params.val_fraction,
        max_shards=params.train_shards,
        out=request.out,
        scratch=request.scratch,
    )
    if not work.run(lambda done: request.on_progress(done, len(found)), request.should_stop):
        return None
    for path, notes in work.notes.items():
        _say(Path(path), notes, request)
    if not params.validation:
        (request.out / VAL).unlink()
    return Made(work.names(), VAL if params.validation else None)


def _say(path: Path, notes: dict[str, int], request: Request) -> None:
    if line := counted(notes):
        request.say(printable(f"{path.name}: {line}", keep=""))
