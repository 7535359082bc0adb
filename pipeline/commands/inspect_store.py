"""Looking at what there is: lists, explanations, logs, and what may be deleted."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.durable import read_fields, read_json, read_record
from data.durable import remove as delete
from pipeline.artifacts.store import RECORD, Artifact, Store
from pipeline.errors import UserError
from pipeline.job import PROGRESS
from pipeline.numbers import duration, money
from pipeline.plan.plan import Plan, Step
from pipeline.plan.session import RUN
from pipeline.runner.launch import OUTCOME

SHA256 = re.compile(r"\b[0-9a-f]{64}\b")

FOLLOW_SECONDS = 0.3  # between looks at a log

RESULT_COLUMNS = 110  # of a terminal, from which on `ls` also shows results

# What to do about unfinished work, by cause. How things are run is no part of a key, so that work goes on; where a
# setting must change, the key does, and other work begins.
REMEDIES = {
    "oom": "continues with less memory in use: the same command with launch.device_batch_size=4, or fewer workers",
    "disk": "make room (`gc`), then the same command continues it",
    "data": "see to what it says, then the same command continues it",
    "config": "the same command would fail again: change what it says; `rm {key}` deletes what is left of this",
    "nan": "the same command would fail again: change what it says; `rm {key}` deletes what is left of this",
    "unknown": "`log {stage}` tells more; the same command tries again from where it was",
}


def print_ending(console: Console, store: Store, artifacts: list[Artifact]) -> None:
    """What a run leaves the user with: the report's summary, and how to chat."""
    for artifact in artifacts:
        if artifact.module != "report":
            continue
        from pipeline.stages.report import summary

        rows = summary(store.open(artifact))
        if rows:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for i, column in enumerate(rows[0]):
                table.add_column(column, justify="left" if i == 0 else "right")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
        console.print(f"Report: {artifact.folder / 'report.html'}", soft_wrap=True)
    if any(artifact.module in ("rl", "finetune") for artifact in artifacts):
        console.print("Chat:   python flows.py chat        (here on the terminal: python flows.py chat --cli)")


def print_scores(console: Console, store: Store, artifact: Artifact) -> None:
    """Print the results of an evaluation as its stage did when it ran; nothing for other artifacts."""
    if artifact.module != "evaluate":
        return
    from pipeline.stages.evaluate import lines

    for line in lines(json.loads((store.open(artifact) / "results.json").read_bytes())):
        console.print(f"{artifact.stages[0]}  {line}", soft_wrap=True)


def print_why(console: Console, plan: Plan, names: list[str]) -> None:
    """The key of each stage and what it is made of; for a stage that would run, what changed."""
    for step in plan.steps.values():
        if names and step.name not in names:
            continue
        console.print(Text(f"{step.name}  {step.key or 'key unknown until download'}  {step.action}", style="bold"))
        if step.why:
            console.print(f"  {step.why}", soft_wrap=True)
        if step.key != step.wanted:
            console.print(f"  {step.wanted} in the words of config and code; {step.key} is used instead")
        if len(names) == 1:
            _print_content(console, step)


def _print_content(console: Console, step: Step) -> None:
    content = step.content
    for source, key in (content.get("inputs") or {}).items():
        console.print(f"  input {source}: {key}")
    console.print_json(json.dumps({"params": content.get("params"), "identity": content.get("identity")}))
    for module, parts in (content.get("code") or {}).items():
        console.print(f"  code {module}: {len(parts)} definitions", style="dim")
    if step.artifact:
        record = step.artifact.record
        resolved = {k: v for k, v in record.get("metrics", {}).items() if k.startswith("resolved_")}
        console.print(
            f"  made in {duration(record['seconds'])} on {record['device']}, {money(record['usd'])} {resolved or ''}"
        )


def print_status(console: Console, store: Store) -> None:
    """Unfinished work: running now, or waiting to be continued."""
    shown = 0
    for work in sorted((store.root / "work").glob("*")):
        if not (work / "job.json").exists():
            continue
        job = _job(work)
        shown += 1
        alive = _alive(store, work)
        state = read_record(work / "progress.json", PROGRESS)
        outcome = read_fields(work / "outcome.json", OUTCOME)
        at = f"{state['done']:g}/{state['total']:g} {state['unit']}" if state else "starting" if alive else "not begun"
        failed = outcome["status"] == "failed"
        how = f"failed ({outcome['cause']})" if failed else outcome["status"] or "interrupted"
        told = f"{job['stage']:<16} {job['key']}  {'running' if alive else how}  {at}  {outcome['message']}"
        console.print(told.rstrip(), soft_wrap=True)
        if not alive:
            ahead = REMEDIES.get(outcome["cause"] if failed else "", "the same command continues it")
            ahead = ahead.format(stage=job["stage"], key=job["key"])
            console.print(Text(f"{'':<16} {ahead}", style="dim"), soft_wrap=True)
    if not shown:
        console.print("Nothing runs, and nothing is unfinished.")
    for state_path in sorted((store.root / "runs").glob("*/state.json"))[-3:]:
        if (state := read_record(state_path, RUN)) is None:
            continue
        ended = time.strftime("%d %b %H:%M", time.localtime(state["started"]))
        how = "ended" if state["ended"] else "running or cut off"
        overrides = " ".join(map(str, state["overrides"]))
        line = Text(f"run {state_path.parent.name}  {ended}  {how}  {overrides}", style="dim")
        console.print(line, soft_wrap=True)


def find_unfinished(store: Store, name: str, by_stage: bool = False) -> Path | None:
    """The unfinished work with this key, or its first digits; by_stage: or the newest of this stage.

    Raises UserError for digits that several begin with.
    """
    works = sorted((store.root / "work").glob("*"), key=_changed_at, reverse=True)
    named = [w for w in works if name == w.name or (len(name) >= 4 and w.name.rpartition("-")[2].startswith(name))]
    if len(named) > 1:
        said = ", ".join(work.name for work in named)
        raise UserError(f"{name!r} fits several unfinished works: {said}", str(store.root), "Give more of the key.")
    of_stage = [work for work in works if by_stage and _job(work)["stage"] == name]
    return next(iter(named + of_stage), None)


def remove(store: Store, names: list[str]) -> list[str]:
    """Delete artifacts, and unfinished work named by its key; what was removed. Raises UserError before it begins."""
    found = [find_unfinished(store, name) or store.find_by_name(name) for name in names]
    for item in found:
        if isinstance(item, Path) and _alive(store, item):
            raise UserError("is being made now", item.name, "Stop that run first.")
        if isinstance(item, Artifact) and (reader := _reader(store, item)):
            raise UserError(f"is being read by {reader} now", f"{item.module}/{item.key}", "Stop that run first.")
    removed = []
    for item in found:
        if isinstance(item, Path):
            shutil.rmtree(item)
            removed.append(f"{item.name} (unfinished)")
        else:
            store.discard(item.folder)
            removed.append(f"{item.module}/{item.key} ({', '.join(item.stages)})")
    return removed


def find_log(store: Store, name: str) -> Path:
    """The log of a stage: of work under way if there is any, else of the newest artifact. Raises UserError."""
    if work := find_unfinished(store, name, by_stage=True):
        return work / "log.txt"
    path = store.open(store.find_by_name(name), "log.txt") / "log.txt"
    if not path.exists():
        raise UserError("has no log", name)
    return path


def read_log(store: Store, name: str, follow: bool) -> Iterator[str]:
    """The log of a stage, in chunks. follow: also yield what is appended, until the stage ends.

    The open file stays the log when publishing moves it.
    """
    path = find_log(store, name)
    with open(path, errors="replace") as file:
        while True:
            ending = not follow or not _alive(store, path.parent)  # asked first, so that the last lines are read, too
            while text := file.read(1 << 16):
                yield text
            if ending:
                return
            time.sleep(FOLLOW_SECONDS)


def print_artifact(console: Console, artifact: Artifact, as_json: bool) -> None:
    record = artifact.record
    if as_json:
        print(json.dumps(record, indent=1))
        return
    console.print(Text(f"{artifact.module}/{artifact.key}  made by {', '.join(artifact.stages)}", style="bold"))
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["finished"]))
    console.print(
        f"{made}, {duration(record['seconds'])} on {record['device']} x {record['nproc']}, {money(record['usd'])}"
    )
    console.print(f"{artifact.folder}, {artifact.bytes / 1e6:.1f} MB in {len(record['files'])} files", soft_wrap=True)
    for name in ("inputs", "params", "metrics", "versions"):
        if record.get(name):
            console.print(Text(name, style="dim"))
            console.print_json(json.dumps(record[name]))


def print_list(console: Console, store: Store, names: list[str]) -> None:
    """Artifacts, newest first, a line each; with names, those of these stages or modules."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ["stage", "key", "made", "took", "size", "run", "result"]
    if console.width < RESULT_COLUMNS:
        columns.remove("result")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in ("took", "size") else "left")
    tags = _names_by_artifact(store)
    for artifact in store.all():
        if names and not {artifact.module, *artifact.stages} & set(names):
            continue
        record = artifact.record
        made = time.strftime("%d %b %H:%M", time.localtime(record["finished"]))
        size = f"{artifact.bytes / 1e6:.1f} MB"
        run = ", ".join(tags.get((artifact.module, artifact.key), []))
        cells = [", ".join(artifact.stages), artifact.key, made, duration(record["seconds"]), size, run]
        table.add_row(*map(Text, [*cells, _headline(artifact)][: len(columns)]))
    if table.row_count:
        console.print(table)
    else:
        console.print(f"{store.root} holds nothing{' of that name' if names else ' yet'}.", soft_wrap=True)


def _headline(artifact: Artifact) -> str:
    shown = [
        (k, v) for k, v in artifact.metrics.items() if isinstance(v, (int, float)) and not k.startswith("resolved_")
    ]
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown[:4])


def _names_by_artifact(store: Store) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for name, stages in store.memory.named().items():
        for module, key in stages.values():
            if name not in found.setdefault((module, key), []):
                found[module, key].append(name)
    return found


def collect_garbage(store: Store, dry_run: bool) -> list[tuple[Path, int]]:
    """Delete what no artifact needs and no process holds; returns the places with the bytes they took.

    Unfinished work whose artifact exists or that only compared, quarantine, trash, and downloads and token files that
    no artifact links to and no unfinished work will; none of these while anything is being made, which may be about to.
    """
    places = [p for name in ("quarantine", "trash") for p in (store.root / name).glob("*")]
    for work in (store.root / "work").glob("*"):
        module, _, key = work.name.rpartition("-")
        # With an out of its own it is being made once more, and goes on.
        finished = (store.artifacts / module / key / "artifact.json").exists() and not (work / "out").exists()
        if (finished or module.startswith("verify-resume")) and not _alive(store, work):
            places.append(work)
    places += _unused_files(store, done=set(places))
    freed = []
    for path in places:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        freed.append((path, sum(p.stat().st_size for p in files if p.stat().st_nlink == 1)))
        if not dry_run:
            delete(path)
    return freed


def _unused_files(store: Store, done: set[Path]) -> list[Path]:
    """Downloads and token files, whole or begun, that nothing needs. done: work that goes on no more."""
    works = [work for work in (store.root / "work").glob("*") if work not in done]
    if any(_alive(store, work) for work in works):
        return []
    needed: set[str] = set()
    for work in works:
        if not (work / "job.json").exists():
            continue
        if (job := read_json(work / "job.json", dict)) is None:
            return []  # damaged: what it needs is unknown
        needed |= set(SHA256.findall(json.dumps(job)))
        for folder in _job(work)["inputs"].values():
            with suppress(OSError):
                needed |= set(SHA256.findall((Path(str(folder)) / RECORD).read_text(errors="replace")))
    found = [p for p in (store.root / "blobs").glob("*") if p.is_file() and p.stat().st_nlink == 1]
    found += [p for p in (store.root / "blobs" / "tmp").glob("*") if p.suffix != ".lock"]
    for shard in (store.root / "tokens").glob("*/*"):
        if shard.is_dir() and all(p.stat().st_nlink == 1 for p in shard.glob("*.npy")):
            found.append(shard)
    return [path for path in found if path.name.partition(".")[0] not in needed]


def _changed_at(work: Path) -> float:
    try:
        return work.stat().st_mtime
    except FileNotFoundError:  # just published or removed
        return 0.0


def _reader(store: Store, artifact: Artifact) -> str | None:
    """The stage that is being made of the artifact now, if any is."""
    for work in (store.root / "work").glob("*"):
        job = _job(work)
        if str(artifact.folder) in job["inputs"].values() and _alive(store, work):
            return str(job["stage"])
    return None


def _alive(store: Store, work: Path) -> bool:
    """Whether somebody is making this now."""
    path = store.root / "locks" / f"{work.name}.lock"
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _job(work: Path) -> dict[str, Any]:
    """Stage, key and inputs of the work in `work`, by its job.json or else its name."""
    module, _, key = work.name.rpartition("-")
    named = {"stage": module, "key": key, "inputs": {}}
    return read_fields(work / "job.json", named)
