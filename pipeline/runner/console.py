"""What a run looks like on the terminal: a live line a stage, plain lines where the output is no terminal."""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.numbers import duration, money
from pipeline.plan.plan import Plan, Step
from pipeline.printing import PlainConsole
from pipeline.runner.make import Events

PLAIN_SECONDS = 15.0  # between progress lines of a stage where there is no terminal


def plan_table(plan: Plan, everything: bool = True) -> Table:
    """The plan as a table: what happens to each stage, why, how long and for how much."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "", "key", "time", "cost", "why"):
        justify: Literal["left", "right"] = "right" if column in ("time", "cost") else "left"
        table.add_column(column, overflow="fold", no_wrap=column != "why", justify=justify)
    for step in plan.steps.values():
        if not everything and step.action != "run":
            continue
        style = {"run": "bold", "cached": "green", "idle": "dim"}[step.action]
        word = {"run": "run", "cached": "cached", "idle": "not needed"}[step.action]
        paid = step.action == "run"
        table.add_row(
            Text(step.name, style=style),
            Text(word, style=style),
            step.key or "?",
            ("?" if step.seconds is None else duration(step.seconds)) if paid else "",
            ("?" if step.usd is None else money(step.usd)) if paid else "",
            Text(_why(step), style="dim"),
        )
    return table


def _why(step: Step) -> str:
    if step.stage.pin:
        return f"pinned to {step.key}"
    if step.key != step.wanted:
        return f"{step.key} was accepted as equal"
    return step.why


class RunConsole(PlainConsole):
    """Falls silent when it cannot be written to (a closed pipe, a dropped terminal, a full disk); the run continues."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunView:
    """Shows a run as it goes. Its methods come from several threads."""

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
        self._told: dict[str, float] = {}
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
            self._started[stage] = self._told[stage] = time.monotonic()
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
            elif not self.live and time.monotonic() - self._told.get(stage, 0.0) >= PLAIN_SECONDS:
                self._told[stage] = time.monotonic()
                self._line(stage, _position(state["done"], state["total"], state["unit"]), shown)

    def on_say(self, stage: str, line: str) -> None:
        with self._lock:
            self._line(stage, line)

    def on_wait(self, stage: str, what: str) -> None:
        with self._lock:
            if self.live:
                if stage not in self._tasks:
                    self._tasks[stage] = self.progress.add_task(stage, total=None, shown="", unit="")
                self.progress.update(self._tasks[stage], shown=f"waits for {what}")
            elif time.monotonic() - self._told.get(stage, -PLAIN_SECONDS) >= PLAIN_SECONDS:
                self._told[stage] = time.monotonic()
                self._line(stage, f"waits for {what}")

    def on_end(self, stage: str, how: str, seconds: float) -> None:
        with self._lock:
            self._remove(stage)
            style = {"made": "green", "failed": "red", "stopped": "yellow"}.get(how, "")
            text = f"{how} in {duration(seconds)}" if seconds else how
            self._line(stage, text, style=style)

    def _describe(self, stage: str, state: dict[str, Any]) -> str:
        parts = [f"{name} {_number(value)}" for name, value in state.get("shown", {}).items()]
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
    """How far a stage has come, in its own unit."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(_position(task.completed, task.total, task.fields["unit"]))


def _position(done: float, total: float, unit: str) -> str:
    if unit == "bytes":
        done, total, unit = done / 1e6, total / 1e6, "MB"
    return f"{_short(done)}/{_short(total)} {unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.1f}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
