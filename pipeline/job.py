"""Everything that a stage gets: its parameters, the folders that it reads and writes, and ways to report.

A stage never learns who runs it, from where, or under which name its artifact will be stored.
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from data.durable import keep_json, write_text
from data.trust import printable
from model.checks import Amount, Count, CountOrOff, Natural, PositiveOrOff
from pipeline.errors import PipelineError

Params = TypeVar("Params")

PROGRESS = {"done": 0.0, "total": 0.0, "unit": "", "shown": {}, "at": 0.0}  # progress.json


class Stopped(PipelineError):
    """Raised by a stage that was asked to stop and has saved what it needs to resume."""

    cause = "preempted"


@dataclass
class Launch:
    """How a stage is run. Nothing in here may change what is made, so nothing in here enters its key."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    nproc: Count = 1  # processes under torchrun, for stages with ranks
    threads: Count | None = None  # CPU threads per process; null: the cores divided by nproc
    workers: Count = 2  # helper processes or connections of the stages that prepare data
    device_batch_size: Count | Literal["auto"] = "auto"  # rows of one forward pass; auto: what fits
    compile: bool = False  # torch.compile; needs a C++ compiler
    grad_checkpoint: bool = False  # recompute activations in backward: less memory, about a third slower
    deterministic: bool = False  # bitwise equal on resume; slower on GPUs
    save_every: CountOrOff = None  # steps between checkpoints; null: by save_minutes alone
    save_minutes: PositiveOrOff = 10.0  # between checkpoints
    keep_last: Count = 2  # checkpoints
    keep_every: CountOrOff = None  # also keep each checkpoint whose step is a multiple of this
    resume: Literal["latest", "never"] | Natural = "latest"  # latest | never | a step; for unfinished work
    profile: bool = False  # write a profiler trace of a few steps into the artifact
    sandbox: Literal["strict", "weak"] = "strict"  # weak: run model-written code unconfined, too; the report says so
    log_every: Count = 10  # steps
    slots: Count = 1  # stages that may run side by side
    grace_seconds: Amount = 60.0  # for a stage that is asked to stop
    timeout_minutes: PositiveOrOff = None  # of one attempt at a stage; then it is ended, and tried again
    retries: Natural = 2  # after a lost peer or a preemption
    usd_per_hour: Amount = 0.0  # of this machine, for estimates and guard.budget_usd


class Logger(Protocol):
    """Receives a copy of the stage's measurements: of steps, and at the end what the stage returns."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...
    def summary(self, metrics: dict[str, Any]) -> None: ...
    def close(self, done: bool) -> None: ...


@dataclass
class Job(Generic[Params]):
    """One stage at work.

    inputs: the artifact folder of each input by its name; read-only.
    out: files put here are published when main returns; they survive a crash, and a resumed stage finds them.
    scratch: survives a crash, is removed at publishing.
    store: the root of the store, for stages that share files below the level of an artifact.
    data_identity: the result of the module's hook of that name.
    """

    stage: str
    key: str
    params: Params
    launch: Launch
    inputs: dict[str, Path]
    work: Path
    store: Path
    data_identity: dict[str, Any] | None = None
    context: dict[str, Any] = field(default_factory=dict)  # facts that a report may show; never read to make results
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    loggers: list[Logger] = field(default_factory=list)
    stop_requested: bool = False
    _progress_at: float = 0.0

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)

    @property
    def out(self) -> Path:
        return self.work / "out"

    @property
    def scratch(self) -> Path:
        return self.work / "scratch"

    @property
    def should_stop(self) -> bool:
        """Whether to save and raise Stopped. Ranks may see it at different steps: agree before acting on it."""
        return self.stop_requested or (self.work / "stop").exists()

    def log(self, step: int, **metrics: Any) -> None:
        """Append one line of measurements to metrics.jsonl; on ranks other than 0 nothing happens."""
        if self.rank != 0:
            return
        with open(self.work / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for logger in self.loggers:
            logger.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Drop the measurements after `step`, which a stage that resumes from there will make again."""
        path = self.work / "metrics.jsonl"
        if self.rank != 0 or not path.exists():
            return
        kept = [line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        """Report how far the stage has come. Cheap enough for each step: it writes at most three times per second."""
        now = time.monotonic()
        if self.rank != 0 or (now - self._progress_at < 0.3 and done < total):
            return
        self._progress_at = now
        state = {"done": done, "total": total, "unit": unit, "shown": shown, "at": time.time()}
        with suppress(OSError):  # failing to show progress must not end the stage
            keep_json(self.work / "progress.json", state, sync=False)

    def say(self, text: str) -> None:
        """Write one line to the log and to the terminal."""
        if self.rank != 0:
            return
        line = printable(text)  # names of files and of tasks may be quoted in it
        with suppress(OSError):
            print(line, flush=True)
            with open(self.work / "said.txt", "a") as file:
                file.write(line.replace("\n", " ") + "\n")


@dataclass
class Counted:
    """The progress of a stage that only counts. stopped: the message of Stopped if the stage is asked to stop."""

    job: Job[Any]
    total: int
    unit: str
    stopped: str
    done: int = 0

    def add(self, count: int, **shown: Any) -> None:
        """Raises Stopped. More than `total` counts as all: totals are often estimates."""
        self.done += count
        self.job.progress(min(self.done, self.total), self.total, self.unit, **shown)
        if self.job.should_stop:
            raise Stopped(self.stopped)


def _step_of(line: str) -> float:
    """A line cut off by a crash belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
