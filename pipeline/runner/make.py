"""Makes one stage: takes its lock, looks again, runs it, publishes it. The only place that writes artifacts."""

import dataclasses
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data.durable import keep_json, read_json, read_record
from data.trust import fits
from pipeline.artifacts import disk
from pipeline.artifacts.locks import Lock, wait_for_orphans
from pipeline.artifacts.store import Artifact, Store
from pipeline.errors import Corrupt, Interrupted, StageFailed, UserError
from pipeline.job import PROGRESS
from pipeline.plan import keys
from pipeline.plan.code import code_of
from pipeline.plan.dag import Stage
from pipeline.plan.keys import CHECKOUT, ROOT
from pipeline.plan.plan import Step
from pipeline.runner import gpus, launch
from pipeline.runner import machine as hardware
from pipeline.runner.signals import StopSwitch

ATTEMPTS = "attempts.json"


@dataclass
class Events:
    """Callbacks for progress and messages, called in the thread that makes the stage."""

    started: Callable[[str, str, Path], None] = lambda stage, why, log: None
    progress: Callable[[str, dict[str, Any]], None] = lambda stage, state: None
    say: Callable[[str, str], None] = lambda stage, line: None
    waiting: Callable[[str, str], None] = lambda stage, what: None
    ended: Callable[[str, str, float], None] = lambda stage, how, seconds: None


@dataclass
class Maker:
    """Makes the stages of one run.

    provenance: facts recorded with each artifact (run, run_name, recipe, host, git, dirty_diff).
    """

    store: Store
    switch: StopSwitch
    events: Events
    provenance: dict[str, Any]
    logger: dict[str, Any]
    slots: int
    min_free_gb: float = 0.0
    turn: Callable[[Step], AbstractContextManager[None]] = lambda step: nullcontext()  # around work, within its slot
    _slots: threading.BoundedSemaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = threading.BoundedSemaphore(self.slots)

    def make(
        self,
        step: Step,
        inputs: dict[str, Artifact],
        behind: dict[str, Artifact],
        force: bool,
    ) -> Artifact:
        """The artifact of `step`, made unless another process made it meanwhile.

        inputs: by the names under which the stage reads them. behind: all artifacts upstream, by stage, for reports.

        Raises StageFailed, Interrupted (asked to stop; what was done is kept) or UserError.
        """
        assert step.key is not None
        stage, since = step.stage, time.time()
        who = {"stage": stage.name, "run": self.provenance["run"], "since": since}
        lock = Lock(self.store.lock_path(stage.run, step.key), who, self._on_wait(step), self._stopping)
        with ExitStack() as held:
            held.enter_context(disk.failures_of(stage.name, self.store.work(stage.run, step.key), self.store.root))
            held.enter_context(lock)
            found = self._look(step)
            if found and not (force and found.record["started"] < since):
                self.events.ended(stage.name, "made by another run", 0.0)
                self.store.note_use(found, stage.name)
                return found
            # GPUs come before a slot: a waiting stage must not occupy one.
            wait = partial(self.events.waiting, stage.name)
            env = held.enter_context(gpus.taken_by(stage, wait, self._stopping))
            held.enter_context(self._slot(step))
            held.enter_context(self.turn(step))
            self._check_code(step)
            for artifact in inputs.values():
                self.store.open(artifact)  # planning verified it, perhaps hours ago
            work = self._open_work(step)
            self.events.started(stage.name, step.why, work / "log.txt")
            job = self._job(step, inputs, behind, work)
            attempts = _attempts(work)
            outcome = self._run(step, job, work, env, lock, attempts)
            artifact = self.store.publish(work, self._record(step, outcome, attempts))
            self.events.ended(stage.name, "made", artifact.record["seconds"])
            return artifact

    @staticmethod
    def _check_code(step: Step) -> None:
        """Raise UserError if code was edited since planning: an artifact must be made by the code in its key."""
        planned = step.content.get("code", {})
        if changes := keys.code_changes(planned, code_of(step.stage.run, step.content.get("params")).parts):
            raise UserError(
                f"code changed since this run was planned: {'; '.join(changes)}", step.name, "Run it again."
            )

    def _look(self, step: Step) -> Artifact | None:
        assert step.key is not None
        try:
            return self.store.find(step.stage.run, step.key)
        except Corrupt as error:
            self.store.quarantine(self.store.folder(step.stage.run, step.key), error.what)
            self.events.say(step.name, f"{error.what}; moved to quarantine, making it again")
            return None

    def _open_work(self, step: Step) -> Path:
        assert step.key is not None
        work = self.store.work(step.stage.run, step.key)
        work.mkdir(parents=True, exist_ok=True)
        wait_for_orphans(
            work, lambda: self.events.waiting(step.name, "workers of an earlier run to end"), self._stopping
        )
        if step.stage.launch.resume == "never":
            shutil.rmtree(work)
            work.mkdir()
        for name in ("log.txt", "metrics.jsonl"):  # a crash while publishing left them there
            if (work / "out" / name).exists() and not (work / name).exists():
                os.replace(work / "out" / name, work / name)
        free_gb = shutil.disk_usage(work).free / 1e9
        if free_gb < self.min_free_gb:
            raise UserError(
                f"{free_gb:,.2f} GB of disk are free, {self.min_free_gb:,g} are needed (store.min_free_gb)",
                str(self.store.root),
                "`gc` frees what nothing needs.",
            )
        return work

    def _run(
        self,
        step: Step,
        job: dict[str, Any],
        work: Path,
        env: dict[str, str],
        lock: Lock,
        attempts: list[dict[str, Any]],
    ) -> launch.Outcome:
        """Run the stage until it is done, again after passing failures. attempts: each is added to it."""
        stage = step.stage

        watch = launch.Watch(
            on_progress=partial(self.events.progress, stage.name),
            on_say=lambda line: self.events.say(stage.name, line),
            should_stop=self._stopping,
            why_kill=lambda: self.switch.why_kill or ("" if lock.holds() else "another run took over its work"),
        )
        for attempt in range(stage.launch.retries + 1):
            outcome = launch.run(work, job, stage.module.RANKS, stage.launch, watch, env)
            lock.check()  # else the work folder is another's
            attempts.append(
                {"started": time.time() - outcome.seconds, "seconds": outcome.seconds, "status": outcome.status}
            )
            with suppress(OSError):  # the work matters more than the record of what it cost
                keep_json(work / ATTEMPTS, attempts)
            if outcome.status == "done":
                return outcome
            if self._stopping():
                self.events.ended(stage.name, "stopped", outcome.seconds)
                raise Interrupted(f"{stage.name}: {outcome.message or 'ended before it could save'}")
            again = outcome.cause in ("peer_lost", "preempted") and attempt < stage.launch.retries
            if not again:
                break
            self.events.say(stage.name, f"{outcome.message}; resuming from the last checkpoint")
        self.events.say(stage.name, outcome.message)
        self.events.ended(stage.name, "failed", outcome.seconds)
        raise StageFailed(stage.name, outcome.cause or "unknown", outcome.message, str(work / "log.txt"))

    def _job(self, step: Step, inputs: dict[str, Artifact], behind: dict[str, Artifact], work: Path) -> dict[str, Any]:
        assert step.key is not None
        records = {name: _short_record(artifact) for name, artifact in behind.items()}
        folders = {name: artifact.folder for name, artifact in inputs.items()}
        return job_file(step.stage, step.key, step.data_identity, folders, work, self.store.root) | {
            "logger": self.logger,
            "context": self.provenance | {"stages": records},
        }

    def _record(self, step: Step, outcome: launch.Outcome, attempts: list[dict[str, Any]]) -> dict[str, Any]:
        stage, finished = step.stage, time.time()
        seconds = sum(a["seconds"] for a in attempts)
        return self.provenance | {
            "module": stage.run.rpartition(".")[2],
            "run_module": stage.run,
            "stages": [stage.name],
            "key": step.key,
            **step.content,
            "source": (step.data_identity or {}).get("source"),
            "metrics": outcome.metrics,
            "started": attempts[0]["started"],
            "finished": finished,
            "seconds": seconds,
            "attempts": len(attempts),
            "device": outcome.device or "cpu",
            "nproc": stage.launch.nproc if stage.module.RANKS else 1,
            "usd": seconds / 3600 * stage.launch.usd_per_hour,
            "versions": outcome.versions,
            "launch": dataclasses.asdict(stage.launch),
        }

    @contextmanager
    def _slot(self, step: Step) -> Iterator[None]:
        """One of the run's places to work in."""
        while not self._slots.acquire(timeout=0.5):
            if self._stopping():
                raise Interrupted(f"{step.name} had not started")
        try:
            yield
        finally:
            self._slots.release()

    def _stopping(self) -> bool:
        return self.switch.asked

    def _on_wait(self, step: Step) -> Callable[[dict[str, Any]], None]:
        def tell(holder: dict[str, Any]) -> None:
            assert step.key is not None
            since = time.strftime("%H:%M:%S", time.localtime(holder.get("since") or time.time()))
            state = read_record(self.store.work(step.stage.run, step.key) / "progress.json", PROGRESS)
            at = f", at {state['done']:g} of {state['total']:g} {state['unit']}" if state else ""
            who = f"run {holder.get('run') or '?'} (process {holder.get('pid') or '?'})"
            self.events.waiting(step.name, f"{who}, which has been making it since {since}{at}")

        return tell


def _attempts(work: Path) -> list[dict[str, Any]]:
    """Earlier attempts at this work."""
    known = read_json(work / ATTEMPTS, list) or []
    return [attempt for attempt in known if fits(attempt, {"started": 0.0, "seconds": 0.0})]


def job_file(
    stage: Stage, key: str, data_identity: dict[str, Any] | None, inputs: dict[str, Path], work: Path, store: Path
) -> dict[str, Any]:
    """The content of job.json, without the facts about the run."""
    return {
        "stage": stage.name,
        "module": stage.run,
        "key": key,
        "params": _absolute_files(stage.params),
        "launch": dataclasses.asdict(stage.launch),
        "inputs": {name: str(folder) for name, folder in inputs.items()},
        "work": str(work),
        "store": str(store),
        "data_identity": data_identity,
    }


def _short_record(artifact: Artifact) -> dict[str, Any]:
    """An artifact's record without its long parts."""
    return {name: value for name, value in artifact.record.items() if name not in ("files", "code", "dirty_diff")}


def _absolute_files(params: Any) -> Any:
    """Parameters as plain values; local files by absolute path, since a stage runs elsewhere."""
    if dataclasses.is_dataclass(params):
        return {
            f.name: os.path.abspath(value) if f.metadata.get("file") and value else _absolute_files(value)
            for f in dataclasses.fields(params)
            for value in [getattr(params, f.name)]
        }
    if isinstance(params, (list, tuple)):
        return [_absolute_files(item) for item in params]
    if isinstance(params, dict):
        return {name: _absolute_files(item) for name, item in params.items()}
    return params


def provenance(run: str, run_name: str | None, recipe: str) -> dict[str, Any]:
    """Where an artifact comes from, recorded beside it and never part of its key."""
    return {
        "run": run,
        "run_name": run_name,
        "recipe": recipe,
        "machine": hardware.describe(),
        "git": _git("rev-parse", "HEAD"),
        "dirty_diff": _git("diff", "HEAD")[:200_000],
    }


def _git(*arguments: str) -> str:
    if not CHECKOUT:  # it would be the repository that the packages happen to be in
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
