"""`status`, `log` and `report`: what runs, what it says, and what came of it."""

import sys
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from data.durable import read_record
from pipeline.artifacts.store import Store
from pipeline.artifacts.work import Work
from pipeline.commands.cli import STOPPED
from pipeline.commands.parser import Parser
from pipeline.errors import UserError
from pipeline.job import PROGRESS
from pipeline.plan.session import RUN, Session
from pipeline.printing import PlainConsole, say
from pipeline.runner.launch import read_outcome

FOLLOW_SECONDS = 0.3  # between reads of a log

# How to continue unfinished work, by cause. Launch settings are no part of a key, so that changing one continues the
# work. Changing another setting changes the key and starts other work.
AGAIN = "the same command continues it"
SAME_AGAIN = "the same command would fail again: change what it says; `rm {key}` deletes what is left of this"
REMEDIES = {
    "oom": "to continue with less memory, run the same command with launch.device_batch_size=4, or with fewer workers",
    "disk": "make room (`gc`), then the same command continues it",
    "data": "fix what it names, then the same command continues it",
    "config": SAME_AGAIN,
    "nan": SAME_AGAIN,
    "unknown": "`log {stage}` shows more; the same command tries again from where it was",
}


def status(arguments: list[str]) -> int:
    print_status(PlainConsole(), Session.open(Parser("status").parse(arguments).overrides).store)
    return 0


def print_status(console: Console, store: Store) -> None:
    works = [work for work in Work.all(store) if (work.folder / "job.json").exists()]
    for work in works:
        running, outcome = work.running, read_outcome(work.folder)
        progress = read_record(work.folder / "progress.json", PROGRESS)
        at = f"{progress['done']:g}/{progress['total']:g} {progress['unit']}" if progress else ""
        failed = outcome.status == "failed"
        ended = f"failed ({outcome.cause})" if failed else outcome.status or "interrupted"
        state = f"{'running' if running else ended}  {at or ('starting' if running else 'not begun')}"
        stage, key = work.job["stage"], work.job["key"]
        console.print(f"{stage:<16} {key}  {state}  {outcome.message}".rstrip(), soft_wrap=True)
        if not running:
            ahead = REMEDIES.get(outcome.cause if failed else "", AGAIN).format(stage=stage, key=key)
            console.print(Text(f"{'':<16} {ahead}", "dim"), soft_wrap=True)
    if not works:
        console.print("Nothing is running, and nothing is unfinished.")
    for path in sorted((store.root / "runs").glob("*/state.json"))[-3:]:
        if run := read_record(path, RUN):
            began = time.strftime("%d %b %H:%M", time.localtime(run["started"]))
            how, overrides = "ended" if run["ended"] else "running or killed", " ".join(map(str, run["overrides"]))
            console.print(Text(f"run {path.parent.name}  {began}  {how}  {overrides}", "dim"), soft_wrap=True)


def log(arguments: list[str]) -> int:
    parser = Parser("log", "STAGE", least=1, most=1)
    parser.flag("-f", "--follow", help="keep printing until the stage ends")
    flags = parser.parse(arguments)
    try:
        for text in read_log(Session.open(flags.overrides).store, flags.names[0], flags.follow):
            say(text, end="")
    except KeyboardInterrupt:
        return STOPPED
    return 0


def read_log(store: Store, name: str, follow: bool) -> Iterator[str]:
    """The log of a stage, in chunks: of unfinished work if there is any, else of the newest artifact.

    follow: also what is appended, until the stage ends. Raises UserError if there is no log.
    """
    work = Work.find(store, name, by_stage=True)
    path: Path = work.folder if work else store.open(store.find_by_name(name), "log.txt")
    if not (path / "log.txt").exists():
        raise UserError("has no log", name)
    with open(path / "log.txt", errors="replace") as file:  # stays the log when publishing moves it
        while True:
            # Asked before reading, so that the last lines are printed too.
            ending = not (follow and work and work.running)
            while text := file.read(1 << 16):
                yield text
            if ending:
                return
            time.sleep(FOLLOW_SECONDS)


def report(arguments: list[str]) -> int:
    from rich.markdown import Markdown

    parser = Parser("report", "[NAME]", most=1)
    parser.flag("--open", help="show it in a browser")
    flags = parser.parse(arguments)
    store = Session.open(flags.overrides).store
    folder = store.open(store.find_by_name(flags.names[0] if flags.names else "report", ("report",)))
    if flags.open:
        webbrowser.open((folder / "report.html").as_uri())
    else:
        text = (folder / "report.md").read_text()
        PlainConsole().print(Markdown(text, hyperlinks=False)) if sys.stdout.isatty() else say(text, end="")
    say(folder / "report.html", file=sys.stderr)
    return 0
