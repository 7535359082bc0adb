"""One run: carries a plan out, stage by stage, and tells how it went."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.durable import keep_json
from pipeline.artifacts.store import Artifact
from pipeline.errors import Corrupt, Interrupted, StageFailed
from pipeline.plan.aftermath import Aftermath, after, wanted_by_name
from pipeline.plan.plan import Plan, Step, check_guards
from pipeline.plan.session import Session, new_run_id
from pipeline.runner import make, tracking
from pipeline.runner.console import RunView
from pipeline.runner.signals import StopSwitch

SHOW_SECONDS = 5.0  # between what Prefect's pages are told of a stage


@dataclass
class Run:
    """A plan being carried out. `make` is called by one thread a stage, makers before readers."""

    session: Session
    plan: Plan
    maker: make.Maker
    folder: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    _started: set[str] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, overrides: list[str]) -> Iterator["Run"]:
        """Plan with everything checked; Ctrl-C and SIGTERM ask the stages to stop while it is open."""
        session = Session.open(overrides)
        settings = session.settings
        with StopSwitch() as switch, RunView() as view:
            plan, damaged = session.checked_plan()
            for line in damaged:
                view.console.print(line, style="yellow")
            check_guards(plan, settings.guard.usd, settings.guard.budget_usd, settings.force)
            run_id = new_run_id()
            origin = make.provenance(run_id, settings.run.name, settings.recipe)
            tracker, note = tracking.check(settings.logger, online=True)
            if note and plan.running():
                view.console.print(note, style="yellow", soft_wrap=True)
            logger = dict(vars(tracker)) | {"run": settings.run.name or run_id, "sweep": settings.run.sweep}
            maker = make.Maker(
                session.store,
                switch,
                view.events(),
                origin,
                logger,
                settings.launch.slots,
                settings.store.min_free_gb,
            )
            run = cls(session, plan, maker, session.store.root / "runs" / run_id)
            maker.turn = run._turn
            run._begin(overrides)
            for step in plan.steps.values():
                if step.action == "cached":  # Prefect may remember it and never ask
                    run._keep(step, step.artifact)
            try:
                yield run
            finally:
                run._end()

    def make(self, step: Step, show: Callable[[float], None]) -> dict[str, str]:
        """The record of the stage's artifact, made if the plan says so. What goes wrong is kept for raise_failures.

        show(percent) is told now and then how far the stage has come.
        """
        try:
            artifact = self._keep(step, step.artifact if step.action == "cached" else self._make(step, show))
        except BaseException as error:
            with self._lock:
                self.failures.append(error)
            self._note_failure(step, error)
            raise
        return {"stage": step.name, "module": artifact.module, "key": artifact.key, "folder": str(artifact.folder)}

    @contextmanager
    def _turn(self, step: Step) -> Iterator[None]:
        """Surrounds a stage's work. Raises Interrupted instead of starting a stage that a failure has made unneeded."""
        with self._lock:
            if self._failed and step.name in self._aftermath().unneeded:
                raise Interrupted(f"{step.name} had not started")
            self._started.add(step.name)
        try:
            yield
        except BaseException as error:
            self._note_failure(step, error)  # before its slot is free for another
            raise

    def _aftermath(self) -> Aftermath:
        return after(self.plan, self._failed, self._started | self.artifacts.keys(), self._wanted)

    @property
    def _wanted(self) -> set[str]:
        return wanted_by_name(self.plan, self.session.settings.force)

    def _note_failure(self, step: Step, error: BaseException) -> None:
        """Say once what a failed stage means for the others."""
        with self._lock:
            if step.name in self._failed or isinstance(error, Interrupted) or self.maker.switch.asked:
                return
            self._failed.add(step.name)
            self._started.add(step.name)
            going = sorted(self._started - self._failed - self.artifacts.keys())
            said = self._aftermath().describe(going, self._wanted)
        if said:
            self.maker.events.say(step.name, said)

    def _make(self, step: Step, show: Callable[[float], None]) -> Artifact:
        if self.maker.switch.asked:
            raise Interrupted(f"{step.name} had not started")
        inputs = {name: self.artifacts[source] for name, source in step.stage.inputs.items()}
        told = time.monotonic()

        def on_progress(state: dict[str, Any]) -> None:
            nonlocal told
            if time.monotonic() - told >= SHOW_SECONDS:
                told = time.monotonic()
                show(100 * state["done"] / (state["total"] or 1))

        sources = self.session.dag.behind([step.name])
        behind = {name: artifact for name, artifact in self.artifacts.items() if name in sources}
        force = step.name in self.session.settings.force
        return self.maker.make(step, inputs, behind, force, on_progress)

    def _keep(self, step: Step, artifact: Artifact | None) -> Artifact:
        """Remember what stands for the stage in this run, and under run.name in later ones."""
        assert artifact is not None
        with self._lock:
            self.artifacts[step.name] = artifact
            if name := self.session.settings.run.name:
                self.session.store.memory.name(name, {step.name: (artifact.module, artifact.key)})
        return artifact

    def raise_failures(self) -> None:
        """Raise what went wrong first, unless it is the echo of a stop."""
        if self.maker.switch.asked:
            told = [str(e) for e in self.failures if isinstance(e, Interrupted) and "had not started" not in str(e)]
            raise Interrupted("; ".join(told) or "stopped")
        if self.failures:  # prefer the cause to stages that were not started because of it
            raise min(self.failures, key=lambda e: (isinstance(e, Interrupted), not isinstance(e, StageFailed)))

    def record_path(self, step: Step) -> str:
        """Where Prefect keeps its record of the stage, relative to the artifacts' folder."""
        assert step.key is not None
        store = self.session.store
        return f"{store.folder(step.stage.run, step.key).relative_to(store.artifacts)}/_prefect.json"

    def report(self) -> str:
        """The report this run ended with, as Markdown; empty when it made none."""
        for artifact in self.artifacts.values():
            if artifact.module == "report":
                with suppress(OSError, Corrupt):
                    return (self.session.store.open(artifact) / "report.md").read_text()
        return ""

    def plan_rows(self) -> list[dict[str, str]]:
        return [
            {"stage": step.name, "action": step.action, "key": step.key or "?", "why": step.why}
            for step in self.plan.steps.values()
        ]

    def _begin(self, overrides: list[str]) -> None:
        about = {"overrides": overrides, "sweep": self.session.settings.run.sweep}
        self._state = {"pid": os.getpid(), "started": time.time(), "ended": None, **about}
        self._write("config.json", {"overrides": overrides, "config": self.session.composed})
        self._write("plan.json", self.plan_rows())
        self._write("state.json", self._state)

    def _end(self) -> None:
        made = {name: {"module": a.module, "key": a.key} for name, a in self.artifacts.items()}
        failed = [str(error) for error in self.failures]
        with suppress(OSError):  # a full disk, which has been reported already
            self._write("state.json", self._state | {"ended": time.time(), "artifacts": made, "failures": failed})

    def _write(self, name: str, content: Any) -> None:
        keep_json(self.folder / name, content, str)
