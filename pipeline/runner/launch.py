"""Runs a stage as a child process: its log, progress, signals and outcome."""

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.durable import keep_json, read_fields, read_record, remove
from pipeline.artifacts.disk import full
from pipeline.job import PROGRESS, Launch
from pipeline.plan.keys import ROOT
from pipeline.runner import machine as hardware

POLL_SECONDS = 0.1


@dataclass
class Outcome:
    """status: done | stopped | failed; cause as in pipeline.stages.__main__.cause_of."""

    status: str
    cause: str = ""
    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    rank: int = 0


def read_outcome(work: Path) -> Outcome:
    """The outcome that a stage wrote; an empty status if it wrote none."""
    return Outcome(**read_fields(work / "outcome.json", dataclasses.asdict(Outcome(""))))


@dataclass
class Watch:
    """Callbacks of whoever watches a stage."""

    on_progress: Callable[[dict[str, Any]], None] = lambda state: None
    on_say: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False
    why_kill: Callable[[], str] = lambda: ""  # why to end the stage at once, if it must


def command(job_path: Path, ranks: bool, nproc: int) -> list[str]:
    """The command that runs a job, also by hand."""
    if not ranks:
        return [sys.executable, "-m", "pipeline.stages", str(job_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*torchrun, "-m", "pipeline.stages", str(job_path)]


def run(
    work: Path, job: dict[str, Any], ranks: bool, launch: Launch, watch: Watch, env: dict[str, str] | None = None
) -> Outcome:
    """Run the job until all its processes have ended. env: variables for it, besides ours.

    `work` must be exclusively ours. If asked to stop, the stage gets launch.grace_seconds to save before it is killed.
    """
    for name in ("outcome.json", "progress.json", "stop", "said.txt"):
        remove(work / name)
    job_path, started = work / "job.json", time.monotonic()
    keep_json(job_path, job)
    line = command(job_path, ranks, launch.nproc)
    with _Leash(work / "leash"), open(work / "log.txt", "ab") as log:
        log.write(f"$ cd {ROOT} && {shlex.join(line)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment(ranks, launch) | (env or {}) | {"CHATMILL_LEASH": str(work / "leash")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        killed = ""
        try:
            killed = _follow(child, work, launch, watch)
        finally:
            _end_group(child)
    outcome = _outcome(work, child.returncode, killed)
    outcome.seconds = time.monotonic() - started  # all that was paid for, including start and end
    return outcome


class _Leash:
    """A named pipe that is open while the launcher lives. Workers end when it closes.

    It is opened for writing and reading, as opening it for writing alone would block.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.path.unlink(missing_ok=True)
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)


def environment(ranks: bool, launch: Launch) -> dict[str, str]:
    """Environment variables of a stage's process, or of another process that must compute the same."""
    env = dict(os.environ)
    threads = launch.threads or max(1, hardware.cores() // (launch.nproc if ranks else 1))
    env["OMP_NUM_THREADS"] = str(threads)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([p] if (p := env.get("PYTHONPATH")) else []), os.getcwd()])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONHASHSEED"] = "0"
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if launch.deterministic:
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return env


def _follow(child: "subprocess.Popen[bytes]", work: Path, launch: Launch, watch: Watch) -> str:
    """Pass on what the stage reports until it ends, and pass it the request to stop.

    Returns why the stage must be killed; empty if it ended by itself.
    """
    told, asked_at, started = 0, 0.0, time.monotonic()
    seen: dict[str, Any] = {}
    while True:
        ended = child.poll() is not None
        state = read_record(work / "progress.json", PROGRESS)
        if state and state != seen:
            seen = state
            watch.on_progress(state)
        with suppress(OSError):
            lines = (work / "said.txt").read_text(errors="replace").splitlines()
            for text in lines[told:]:
                watch.on_say(text)
            told = len(lines)
        if ended:
            return ""
        overdue = launch.timeout_minutes is not None and time.monotonic() - started > 60 * launch.timeout_minutes
        if not asked_at and (overdue or watch.should_stop()):
            asked_at = time.monotonic()
            (work / "stop").touch()  # reaches every rank, also behind torchrun
        if why := watch.why_kill():
            return why
        if asked_at and time.monotonic() - asked_at > launch.grace_seconds:
            after = "" if watch.should_stop() else f"launch.timeout_minutes={launch.timeout_minutes} had passed, and "
            return f"{after}it did not save within launch.grace_seconds={launch.grace_seconds:g}"
        time.sleep(POLL_SECONDS)


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """Leave no process behind: terminate the group, then kill it. The leash ends workers of torchrun."""
    for sig, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, sig)
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            if sig == signal.SIGTERM and not _group_lives(child.pid):
                return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _outcome(work: Path, returncode: int | None, killed: str) -> Outcome:
    """The outcome that the stage wrote, else one by its exit code. killed: why the launcher killed it, if it did."""
    outcome = read_outcome(work)
    if outcome.status and (outcome.status != "failed" or not killed):  # ranks that lose the killed ones fail as well
        return outcome
    if killed:
        return Outcome("stopped", "preempted", f"ended before it could save: {killed}")
    cause, message = "unknown", f"the process ended with exit code {returncode} without a message"
    if returncode is not None and returncode < 0:
        name = signal.Signals(-returncode).name
        cause, message = "preempted", f"the process was ended by {name}"
        if name == "SIGKILL":
            message += " (perhaps out of memory)"
    if shutil.disk_usage(work).free < 1 << 20:
        cause, message = "disk", full(OSError(), work)
    return Outcome("failed", cause, message)
