"""`ls`, `show`, `rm`, `verify` and `gc`: what the store holds, and what may be deleted."""

import json
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from data.durable import read_json
from data.durable import remove as delete
from pipeline.artifacts.store import RECORD, Artifact, Store
from pipeline.artifacts.work import Work
from pipeline.commands.parser import Parser
from pipeline.errors import Corrupt, UserError
from pipeline.numbers import data_size, duration, money, plural
from pipeline.plan.session import Session
from pipeline.printing import PlainConsole, say, table

SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
RESULT_COLUMNS = 110  # of a terminal: `ls` shows results from this width


def ls(arguments: list[str]) -> int:
    """Print artifacts, newest first, one per line. With names: of these stages or modules."""
    flags = Parser("ls", "[STAGE...]", most=None).parse(arguments)
    store = Session.open(flags.overrides).store
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=200)  # grep needs whole lines
    columns = ["stage", "key", "made", "took", "size", "run", "result"]
    made = table(columns[: 7 if console.width >= RESULT_COLUMNS else 6], right=("took", "size"))
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for run, stages in store.memory.named().items():
        for place in stages.values():
            runs.setdefault(place, {})[run] = None
    for artifact in store.all():
        if not flags.names or {artifact.module, *artifact.stages} & set(flags.names):
            record = artifact.record
            at = time.strftime("%d %b %H:%M", time.localtime(record["finished"]))
            run = ", ".join(runs.get((artifact.module, artifact.key), ()))
            cells = [", ".join(artifact.stages), artifact.key, at, duration(record["seconds"])]
            cells += [data_size(artifact.bytes), run, _headline(artifact)]
            made.add_row(*map(Text, cells[: len(made.columns)]))
    if made.row_count:
        console.print(made)
    else:
        console.print(f"{store.root} has no artifacts{' of that name' if flags.names else ' yet'}.", soft_wrap=True)
    return 0


def _headline(artifact: Artifact) -> str:
    """The first metrics of an artifact."""
    numbers = {k: v for k, v in artifact.metrics.items() if isinstance(v, (int, float))}
    shown = [(name, value) for name, value in numbers.items() if not name.startswith("resolved_")]
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown[:4])


def show(arguments: list[str]) -> int:
    parser = Parser("show", "NAME", least=1, most=1)
    parser.flag("--json", help="print the manifest as it is stored")
    flags = parser.parse(arguments)
    artifact = Session.open(flags.overrides).store.find_by_name(flags.names[0])
    record = artifact.record
    if flags.json:
        print(json.dumps(record, indent=1))
        return 0
    console = PlainConsole()
    console.print(Text(f"{artifact.module}/{artifact.key}  made by {', '.join(artifact.stages)}", "bold"))
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["finished"]))
    where = f"{record['device']} x {record['nproc']}"
    console.print(f"{at}, {duration(record['seconds'])} on {where}, {money(record['usd'])}")
    size = f"{data_size(artifact.bytes)} in {plural(len(record['files']), 'file')}"
    console.print(f"{artifact.folder}, {size}", soft_wrap=True)
    for name in ("inputs", "params", "metrics", "versions"):
        if record.get(name):
            console.print(Text(name, "dim"))
            console.print_json(json.dumps(record[name]))
    return 0


def rm(arguments: list[str]) -> int:
    flags = Parser("rm", "NAME...", least=1, most=None).parse(arguments)
    for removed in remove(Session.open(flags.overrides).store, flags.names):
        say(f"removed {removed}")
    return 0


def remove(store: Store, names: list[str]) -> list[str]:
    """Delete artifacts, and unfinished work by its key. Returns what was deleted. Raises UserError before it begins."""
    found = [Work.find(store, name) or store.find_by_name(name) for name in names]
    for item in found:
        if isinstance(item, Work) and item.running:
            raise UserError("is being made now", item.name, "Stop that run first.")
        if isinstance(item, Artifact):
            reader = next((work for work in Work.all(store) if work.reads(item) and work.running), None)
            if reader:
                what = f"is being read by {reader.job['stage']} now"
                raise UserError(what, f"{item.module}/{item.key}", "Stop that run first.")
    removed = []
    for item in found:
        if isinstance(item, Work):
            shutil.rmtree(item.folder)
            removed.append(f"{item.name} (unfinished)")
        else:
            store.discard(item.folder)
            removed.append(f"{item.module}/{item.key} ({', '.join(item.stages)})")
    return removed


def verify(arguments: list[str]) -> int:
    """Hash files against their manifests, and move what is damaged to quarantine. Returns 1 if anything was."""
    flags = Parser("verify", "[NAME...]", most=None).parse(arguments)
    store = Session.open(flags.overrides).store
    chosen = [store.find_by_name(name) for name in flags.names] or list(store.all())
    bad = 0
    for folder, error in store.unreadable() if not flags.names else ():
        bad += 1
        say(f"BAD   {folder.parent.name}/{folder.name}  {store.set_aside(folder, error)}")
    if not chosen and not bad:
        say(f"{store.root} has no artifacts yet.")
    for artifact in chosen:
        name = f"{artifact.module}/{artifact.key}"
        try:
            store.find(artifact.module, artifact.key)
            say(f"good  {name}  {plural(store.verify(artifact, everything=True), 'file')}")
        except Corrupt as error:
            bad += 1
            say(f"BAD   {name}  {store.set_aside(artifact.folder, error.what)}")
    return 1 if bad else 0


def gc(arguments: list[str]) -> int:
    parser = Parser("gc")
    parser.flag("--dry-run", help="only print what would be deleted")
    flags = parser.parse(arguments)
    freed = collect_garbage(Session.open(flags.overrides).store, flags.dry_run)
    for path, size in freed:
        say(f"{'would delete' if flags.dry_run else 'deleted'} {path} ({data_size(size)})")
    total = f"{data_size(sum(size for _, size in freed))} in {plural(len(freed), 'place')}"
    print(f"{'Would free' if flags.dry_run else 'Freed'} {total}." if freed else "Nothing to delete.")
    return 0


def collect_garbage(store: Store, dry_run: bool) -> list[tuple[Path, int]]:
    """Delete what no artifact needs and no process uses. Returns the paths with the bytes that this frees.

    That is: quarantine, trash, unfinished work whose artifact exists or that only compared, and downloads and token
    files that no artifact links to and no unfinished work will. The latter stay while anything is being made.
    """
    paths = [path for name in ("quarantine", "trash") for path in (store.root / name).glob("*")]
    ongoing = []
    for work in Work.all(store):
        module, _, key = work.name.rpartition("-")
        # Work with an `out` of its own is being made again, and will continue.
        done = (store.artifacts / module / key / RECORD).exists() and not (work.folder / "out").exists()
        if (done or module.startswith("verify-resume")) and not work.running:
            paths.append(work.folder)
        else:
            ongoing.append(work)
    paths += _unused_files(store, ongoing)
    freed = []
    for path in paths:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        freed.append((path, sum(p.stat().st_size for p in files if p.stat().st_nlink == 1)))
        if not dry_run:
            delete(path)
    return freed


def _unused_files(store: Store, ongoing: list[Work]) -> list[Path]:
    """Downloads and token files, complete or partial, that nothing needs."""
    if any(work.running for work in ongoing):
        return []
    needed: set[str] = set()
    for work in ongoing:
        if not (work.folder / "job.json").exists():
            continue
        if (job := read_json(work.folder / "job.json", dict)) is None:
            return []  # damaged: what it needs is unknown
        needed |= set(SHA256.findall(json.dumps(job)))
        for folder in work.job["inputs"].values():
            with suppress(OSError):
                needed |= set(SHA256.findall((Path(str(folder)) / RECORD).read_text(errors="replace")))
    found = [p for p in (store.root / "blobs").glob("*") if p.is_file() and p.stat().st_nlink == 1]
    found += [p for p in (store.root / "blobs" / "tmp").glob("*") if p.suffix != ".lock"]
    for shard in (store.root / "tokens").glob("*/*"):
        if shard.is_dir() and all(p.stat().st_nlink == 1 for p in shard.glob("*.npy")):
            found.append(shard)
    return [path for path in found if path.name.partition(".")[0] not in needed]
