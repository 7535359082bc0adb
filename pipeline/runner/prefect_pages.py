"""What Prefect's pages show of a run: its name and tags, the plan, each stage's log and progress, the report.

A server that is slow or gone must not hold up a stage. Calls of Prefect's API are therefore made in a thread of their
own, and what cannot be sent is dropped. Imports Prefect, like flows.py, which alone imports this.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from pathlib import Path
from typing import IO, Any, Self
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Failed, State

from pipeline.errors import FOR_USERS, Interrupted
from pipeline.numbers import duration, metric
from pipeline.plan.plan import Step
from pipeline.runner.console import position
from pipeline.runner.make import Events
from pipeline.runner.run import BEGUN, Run

BAR_SECONDS = 5.0  # between updates of a stage's progress bar
LOG_SECONDS = 15.0  # between lines about a stage's progress and output
LINES = 20  # of a stage's output that are sent at a time
CANCEL_SECONDS = 5.0  # between looks whether the run was cancelled
FLUSH_SECONDS = 10.0  # for the last calls of a run
ATTEMPTS, PAUSE_SECONDS = 5, 2.0  # of a call, while a server starts again


def state_of(error: Exception) -> State[Any]:
    """The state of a run that ends with this, by its message. Raises what was not meant for the user."""
    if isinstance(error, Interrupted):
        return Cancelled(message=str(error))
    if isinstance(error, FOR_USERS):
        return Failed(data=error, message=str(error))
    raise error


class Pages:
    """The pages of one flow run."""

    def __init__(self, run: Run):
        self.run = run
        self.calls = _Calls()
        self.log = get_run_logger()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        run, context = self.run, FlowRunContext.get()
        for note in run.notes:
            self.log.warning(note)
        self.log.info("Store: %s", run.session.store.root)
        self.calls.ask("about", lambda: _describe(run, context))
        if BEGUN.get() and context and context.flow_run:  # a run from a deployment is stopped by a signal
            threading.Thread(target=copy_context().run, args=[self._listen, context.flow_run.id], daemon=True).start()
        self.calls.ask("plan", lambda: create_table_artifact(run.plan_rows(), key="plan", description="What runs, why"))
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if report := self.run.report():
            told = "The report of this run"
            self.calls.ask("report", lambda: create_markdown_artifact(report, key="report", description=told))
        self.calls.close(FLUSH_SECONDS)

    def _listen(self, flow_run: UUID) -> None:
        """Stop the run when it is cancelled in Prefect's UI."""
        while not self._closed.wait(CANCEL_SECONDS):
            with suppress(Exception), get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run).state
                if state and (state.is_cancelling() or state.is_cancelled()):
                    self.log.info("cancelled in Prefect")
                    self.run.maker.switch.ask()
                    return

    def of(self, step: Step) -> Events:
        """Called in the stage's task; the events may come from any thread."""
        return _StagePage(step.name, get_run_logger(), self.calls).events()  # type: ignore[arg-type]


def _describe(run: Run, context: FlowRunContext | None) -> None:
    if context and context.flow_run:
        settings = run.session.settings
        sweep = [f"sweep {settings.run.sweep}"] if settings.run.sweep else []
        tags = {*context.flow_run.tags, settings.recipe, run.run_id, *sweep}
        given = context.flow_run.name if context.flow_run.deployment_id else run.run_id  # perhaps typed in the form
        name = settings.run.name or given
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, name=name, tags=sorted(tags))


class _StagePage:
    """A stage's log, with all that it says and now and then a line of its progress and output, and a progress bar."""

    def __init__(self, stage: str, log: "logging.LoggerAdapter[logging.Logger]", calls: "_Calls"):
        self.stage, self.log, self.calls = stage, log, calls
        self.bar_at = self.log_at = time.monotonic()
        self.bar: Any = None
        self.output: IO[str] | None = None
        self.path = Path()
        self.said: set[str] = set()
        self.passed: set[str] = set()

    def events(self) -> Events:
        return Events(self.on_start, self.on_progress, self.on_say, self.on_wait, self.on_end)

    def on_start(self, stage: str, why: str, log: Path) -> None:
        self.log.info("starts: %s. Its log: %s", why, log)
        self.path = log
        with suppress(OSError):
            self.output = log.open("a+", errors="replace")  # from its end on; stays open when the file is published

    def on_progress(self, stage: str, state: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.bar_at >= BAR_SECONDS:
            self.bar_at = now
            percent = 100 * state["done"] / (state["total"] or 1)
            self.calls.ask(f"bar {stage}", lambda: self._show(percent))
        if now - self.log_at >= LOG_SECONDS:
            self.log_at = now
            shown = ", ".join(f"{name} {metric(value)}" for name, value in state.get("shown", {}).items())
            self.log.info("%s  %s", position(state["done"], state["total"], state["unit"]), shown)
            self._pass_output()

    def on_say(self, stage: str, line: str) -> None:
        self.said.add(line)
        if line not in self.passed:  # it is in the output as well
            self.log.info(line)

    def on_wait(self, stage: str, what: str) -> None:
        if what not in self.said and time.monotonic() - self.log_at >= LOG_SECONDS:
            self.log_at = time.monotonic()
            self.log.info("waits for %s", what)

    def on_end(self, stage: str, how: str, seconds: float) -> None:
        self._pass_output()
        level = logging.ERROR if how == "failed" else logging.INFO
        self.log.log(level, "%s in %s", how, duration(seconds)) if seconds else self.log.log(level, how)

    def _pass_output(self) -> None:
        """Log what the stage has printed since, but for what it has said; the newest lines if they are many."""
        if not self.output:
            return
        lines = [line for text in self.output if (line := text.rstrip()) and line not in self.said]
        lines = [line for line in lines if not line.startswith("$ cd ")]  # the command, for whoever reads the file
        if len(lines) > LINES:
            self.log.info("%d more lines are in %s", len(lines) - LINES, self.path)
        for line in lines[-LINES:]:
            self.log.info(line)
        self.passed.update(lines[-LINES:])

    def _show(self, percent: float) -> None:
        if self.bar:
            update_progress_artifact(self.bar, percent)
        else:
            key = re.sub(r"[^a-z0-9]+", "-", self.stage)
            self.bar = create_progress_artifact(percent, key=key, description=self.stage)


class _Calls:
    """Calls of Prefect's API, one after the other in a thread; of those under one name, only the newest is made."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[Context, Callable[[], Any]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, name: str, call: Callable[[], Any]) -> None:
        with self._changed:
            self._asked[name] = (copy_context(), call)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Wait so long for what was asked."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._closed)
                if not self._asked:
                    return
                name = next(iter(self._asked))
                context, call = self._asked.pop(name)
            for _ in range(ATTEMPTS):
                with suppress(Exception):
                    context.run(call)
                    break
                time.sleep(PAUSE_SECONDS)
