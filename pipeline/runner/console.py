"""A run in the terminal: a live line per stage, or plain lines where the output is not a terminal."""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from pipeline.numbers import duration, metric, short
from pipeline.printing import PlainConsole
from pipeline.runner.make import Events

PLAIN_SECONDS = 15.0  # between progress lines of a stage, without a terminal


class RunConsole(PlainConsole):
    """Falls silent if it cannot be written to (a closed pipe, a dropped terminal, a full disk). The run continues."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunView:
    """Shows a run as it proceeds. Its methods are called from several threads."""

    def __init__(self, console: Console | None = None):
        self.console = console or RunConsole()
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=24),
            _Position(),
            TextColumn("{task.fields[shown]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self.live:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.progress.stop()

    def events(self) -> Events:
        return Events(self.on_start, self.on_progress, self.on_say, self.on_wait, self.on_end)

    def on_start(self, stage: str, why: str, log: Path) -> None:
        with self._lock:
            self._started[stage] = self._shown[stage] = time.monotonic()
            self._line(stage, "starts", why)
            if self.live:
                self._remove(stage)
                self._tasks[stage] = self.progress.add_task(stage, total=None, shown="starting", unit="")

    def on_progress(self, stage: str, state: dict[str, Any]) -> None:
        shown = self._describe(stage, state)
        with self._lock:
            if self.live and stage in self._tasks:
                task = self._tasks[stage]
                self.progress.update(
                    task, completed=state["done"], total=state["total"], shown=shown, unit=state["unit"]
                )
            elif not self.live and time.monotonic() - self._shown.get(stage, 0.0) >= PLAIN_SECONDS:
                self._shown[stage] = time.monotonic()
                self._line(stage, position(state["done"], state["total"], state["unit"]), shown)

    def on_say(self, stage: str, line: str) -> None:
        with self._lock:
            self._line(stage, line)

    def on_wait(self, stage: str, what: str) -> None:
        with self._lock:
            if self.live:
                if stage not in self._tasks:
                    self._tasks[stage] = self.progress.add_task(stage, total=None, shown="", unit="")
                self.progress.update(self._tasks[stage], shown=f"waits for {what}")
            elif time.monotonic() - self._shown.get(stage, -PLAIN_SECONDS) >= PLAIN_SECONDS:
                self._shown[stage] = time.monotonic()
                self._line(stage, f"waits for {what}")

    def on_end(self, stage: str, how: str, seconds: float) -> None:
        with self._lock:
            self._remove(stage)
            style = {"made": "green", "failed": "red", "stopped": "yellow"}.get(how, "")
            text = f"{how} in {duration(seconds)}" if seconds else how
            self._line(stage, text, style=style)

    def _describe(self, stage: str, state: dict[str, Any]) -> str:
        parts = [f"{name} {metric(value)}" for name, value in state.get("shown", {}).items()]
        elapsed = time.monotonic() - self._started.get(stage, time.monotonic())
        if 0 < state["done"] < state["total"] and elapsed > 3:
            parts.append(f"about {duration(elapsed / state['done'] * (state['total'] - state['done']))} left")
        return ", ".join(parts)

    def _remove(self, stage: str) -> None:
        task = self._tasks.pop(stage, None)
        if task is not None:
            with suppress(KeyError):
                self.progress.remove_task(task)

    def _line(self, stage: str, text: str, more: str = "", style: str = "") -> None:
        line = Text(f"{stage:<16} ", style="bold")
        line.append(text, style=style or "not bold")
        if more:
            line.append(f"  {more}", style="not bold dim")
        self.console.print(line, soft_wrap=True)


class _Position(ProgressColumn):
    """The progress of a stage, in its own unit."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(position(task.completed, task.total, task.fields["unit"]))


def position(done: float, total: float, unit: str) -> str:
    if unit == "bytes":
        done, total, unit = done / 1e6, total / 1e6, "MB"
    return f"{short(done)}/{short(total)} {unit}"
