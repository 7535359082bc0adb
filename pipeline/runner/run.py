"""One run: carries a plan out, stage by stage, and tells how it went."""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from data.durable import keep_json
from pipeline.artifacts.store import Artifact
from pipeline.config.quoting import quote
from pipeline.errors import Corrupt, Interrupted, StageFailed
from pipeline.numbers import duration, money
from pipeline.plan.plan import Aftermath, Plan, Step, after, check_guards, wanted_by_name
from pipeline.plan.session import Session, new_run_id
from pipeline.runner import environment, make, tracking
from pipeline.runner import machine as hardware
from pipeline.runner.make import Events
from pipeline.runner.signals import StopSwitch

COMPOSING = threading.Lock()  # Hydra composes by globals of the process


@dataclass
class Run:
    """A plan being carried out.

    `make` is called in one thread per stage, makers before readers. However often it is called for a stage, the stage
    is made once and all callers get the same result.

    notes: what the person who watches should know before it starts.
    """

    session: Session
    plan: Plan
    maker: make.Maker
    run_id: str
    notes: list[str]
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    _asked: dict[str, Future[Artifact]] = field(default_factory=dict)
    _listeners: dict[str, Events] = field(default_factory=dict)
    _started: set[str] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def open(cls, overrides: list[str]) -> Iterator["Run"]:
        """Plan with everything checked, then begin. Several threads may do so at once."""
        with COMPOSING:
            session = Session.open(overrides)
        plan, damaged = session.checked_plan()
        with cls.begin(session, plan, overrides, Events()) as run:
            run.notes[:0] = damaged
            yield run

    @classmethod
    @contextmanager
    def begin(cls, session: Session, plan: Plan, overrides: list[str], view: Events) -> Iterator["Run"]:
        """Carry out a plan while this is open. Ctrl-C and SIGTERM ask the stages to stop.

        A plan that makes nothing leaves no trace in the store.
        """
        settings = session.settings
        check_guards(plan, settings.guard.usd, settings.guard.budget_usd, settings.force)
        with StopSwitch() as switch:
            run_id = new_run_id()
            origin, tracker, note = {"run": run_id}, settings.logger, ""
            if plan.running():
                origin = make.provenance(run_id, settings.run.name, settings.recipe)
                tracker, note = tracking.check(settings.logger, online=True)
            logger = dict(vars(tracker)) | {"run": settings.run.name or run_id, "sweep": settings.run.sweep}
            maker = make.Maker(
                session.store, switch, view, origin, logger, settings.launch.slots, settings.store.min_free_gb
            )
            run = cls(session, plan, maker, run_id, [note] if note else [])
            maker.events, maker.turn = run._told_to_all(view), run._turn
            state = {"pid": os.getpid(), "started": time.time(), "ended": None}
            run._keep_plan(state | {"overrides": overrides, "sweep": settings.run.sweep})
            for step in plan.steps.values():
                if step.action == "cached":  # Prefect may remember it and never ask
                    run._keep(step, step.artifact)
            try:
                yield run
            finally:
                run._keep_outcome()

    def make(self, step: Step, listener: Events | None = None) -> dict[str, str]:
        """The record of the stage's artifact, made if the plan says so. What goes wrong is kept for raise_failures.

        listener: told of the stage from now on, in place of an earlier one.
        """
        with self._lock:
            if listener:
                self._listeners[step.name] = listener
            first = step.name not in self._asked
            asked = self._asked.setdefault(step.name, Future())
        if first:
            try:
                made = self._keep(step, step.artifact if step.action == "cached" else self._make(step))
            except BaseException as error:
                with self._lock:
                    self.failures.append(error)
                self._note_failure(step, error)
                asked.set_exception(error)
            else:
                asked.set_result(made)
        artifact = asked.result()
        return {"stage": step.name, "module": artifact.module, "key": artifact.key, "folder": str(artifact.folder)}

    def make_rest(self) -> None:
        """Make what nobody has asked for yet, each stage as soon as its inputs are there; wait for all stages.

        What goes wrong is kept for raise_failures.
        """
        if self.settled():
            return

        def make_after(sources: list[Future[Any]], step: Step) -> None:
            for source in sources:
                source.result()
            self.make(step)

        steps = self.plan.running()
        made: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(len(steps)) as threads:
            for step in steps:  # makers before readers
                sources = [made[source] for source in step.stage.inputs.values() if source in made]
                made[step.name] = threads.submit(make_after, sources, step)
            wait(made.values())

    def settled(self) -> bool:
        """Return True if no stage is being made, and none is still to be."""
        with self._lock:
            busy = any(not asked.done() for asked in self._asked.values())
            return not busy and (self.maker.switch.asked or not self._aftermath().left)

    def stop(self) -> None:
        """Ask the stages to save and stop, and wait until they have. A signal meanwhile ends them at once."""
        self.maker.switch.ask()
        try:
            wait(self._asked.values())
        except BaseException:
            self.maker.switch.ask()
            wait(self._asked.values())
            raise

    def asked(self) -> bool:
        """Return True if any stage has been asked for."""
        return bool(self._asked)

    @contextmanager
    def _turn(self, step: Step) -> Iterator[None]:
        """Surrounds a stage's work. Raises Interrupted instead of starting one after a stop or, unneeded, a failure."""
        with self._lock:
            if self.maker.switch.asked or (self._failed and step.name in self._aftermath().unneeded):
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

    def _make(self, step: Step) -> Artifact:
        if self.maker.switch.asked:
            raise Interrupted(f"{step.name} had not started")
        inputs = {name: self.artifacts[source] for name, source in step.stage.inputs.items()}
        sources = self.session.dag.behind([step.name])
        behind = {name: artifact for name, artifact in self.artifacts.items() if name in sources}
        return self.maker.make(step, inputs, behind, force=step.name in self.session.settings.force)

    def _told_to_all(self, view: Events) -> Events:
        """Events that reach the view and whoever listens to the stage. What a listener cannot do ends no stage."""

        def both(name: str) -> Callable[..., None]:
            def tell(stage: str, *what: Any) -> None:
                getattr(view, name)(stage, *what)
                with suppress(Exception):
                    if listener := self._listeners.get(stage):
                        getattr(listener, name)(stage, *what)

            return tell

        return Events(**{each.name: both(each.name) for each in dataclasses.fields(Events)})

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
        if self.maker.switch.asked and len(self.artifacts) < sum(s.action != "idle" for s in self.plan.steps.values()):
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

    def keys(self) -> dict[str, str]:
        return {name: artifact.key for name, artifact in self.artifacts.items()}

    def plan_rows(self) -> list[dict[str, str]]:
        def shown(step: Step, value: Any, words: Callable[[Any], str]) -> str:
            return "" if step.action != "run" else "?" if value is None else words(value)

        return [
            {
                "stage": step.name,
                "action": step.action,
                "key": step.key or "?",
                "time": shown(step, step.seconds, duration),
                "price": shown(step, step.usd, money),
                "why": step.why,
            }
            for step in self.plan.steps.values()
        ]

    def _keep_plan(self, state: dict[str, Any]) -> None:
        self._state = state
        if self.plan.running():
            composed = {name: value for name, value in self.session.composed.items() if name != "app"}  # its password
            self._write("config.json", {"overrides": state["overrides"], "config": composed})
            self._write("plan.json", self.plan_rows())
            self._write("state.json", state)

    def _keep_outcome(self) -> None:
        made = {name: {"module": a.module, "key": a.key} for name, a in self.artifacts.items()}
        failed = [str(error) for error in self.failures]
        if self.plan.running():
            with suppress(OSError):  # a full disk, which has been reported already
                self._write("state.json", self._state | {"ended": time.time(), "artifacts": made, "failures": failed})

    def _write(self, name: str, content: Any) -> None:
        keep_json(self.session.store.root / "runs" / self.run_id / name, content, str)


# --- a run and its flow

BEGUN: ContextVar[Run | None] = ContextVar("begun", default=None)  # the run that a command has begun for the flow
PARAMETERS = {"recipe": "recipe", "until": "until", "run.name": "run_name"}  # of the flow, by setting


@contextmanager
def begun(parameters: dict[str, Any]) -> Iterator[Run]:
    """The run that the flow carries out: begun by a command, else composed and planned from the flow's parameters."""
    if run := BEGUN.get():
        yield run
        return
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a worker's folder may hold modules of the user's own
    environment.prepare_proxies()
    overrides = overrides_of(parameters)
    found = [*hardware.launch_overrides(overrides), *tracking.environment_overrides(overrides)]
    with Run.open([*found, *overrides]) as run:
        try:
            yield run
        finally:
            if not run.settled():  # cancelled in Prefect, which raises an exception of its own
                run.stop()


def overrides_of(parameters: dict[str, Any]) -> list[str]:
    """Parameters of the flow as overrides; those among parameters["overrides"] come last and win."""
    given = list(parameters.get("overrides") or [])
    named = {
        setting: value
        for setting, name in PARAMETERS.items()
        if (value := parameters.get(name)) and not any(o.startswith(f"{setting}=") for o in given)
    }
    return [
        *(f"{setting}={value if setting == 'recipe' else quote(value)}" for setting, value in named.items()),
        *given,
    ]


def parameters_of(session: Session, overrides: list[str]) -> dict[str, Any]:
    """Parameters with which the flow would do what these overrides ask for."""
    settings = session.settings
    recipe = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("recipe=")), settings.recipe)
    apart = ("app.", *(f"{setting}=" for setting in PARAMETERS))
    given = [o for o in overrides if not o.lstrip("+").startswith(apart)]
    return {"recipe": recipe, "overrides": given, "until": settings.until or "", "run_name": settings.run.name or ""}
