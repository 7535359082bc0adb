"""`verify-resume`: shows on the user's own config and machine that a killed and resumed training matches an
uninterrupted one to the bit: model, optimiser, generators, metrics."""

import dataclasses
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline.artifacts.locks import Lock
from pipeline.commands.parser import Parser
from pipeline.errors import StageFailed, UserError
from pipeline.numbers import plural
from pipeline.plan.dag import Stage, check_launch
from pipeline.plan.session import Session
from pipeline.runner import gpus, launch
from pipeline.runner import machine as hardware
from pipeline.runner.make import job_file

MEASURED = ("seconds", "tok_s", "mfu", "memory_mb")  # suffixes of metrics that differ between runs
SAVES = 5  # checkpoints of a run; one of them is interrupted
KILLS_TRIED = 5  # to hit a save, which takes milliseconds for a small model

Say = Callable[[str], None]


class Trial:
    """One training of a few steps in a folder of its own."""

    def __init__(self, session: Session, stage: Stage, inputs: dict[str, Path], folder: Path) -> None:
        self.stage, self.work = stage, folder
        self.work.mkdir()
        self.job = job_file(stage, f"verify-{stage.name}", None, inputs, self.work, session.store.root)

    def run(self, kill_when: Callable[[int], bool] | None = None) -> launch.Outcome:
        """Run to the end, or until kill_when(step) is true; then all its processes are ended by SIGKILL."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(kill_when, ended)) if kill_when else None
        if watcher:
            watcher.start()
        try:
            with gpus.taken_by(self.stage, lambda what: None, lambda: False) as env:
                return launch.run(self.work, self.job, self.stage.module.RANKS, self.stage.launch, launch.Watch(), env)
        finally:
            ended.set()
            if watcher:
                watcher.join()

    def _watch(self, kill_when: Callable[[int], bool], ended: threading.Event) -> None:
        while not ended.is_set():
            if kill_when(self.step):
                self._kill()
                return
            time.sleep(0.001)

    def _kill(self) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if str(self.work / "job.json") in (process.info["cmdline"] or []):
                process.kill()

    @property
    def step(self) -> int:
        """The last step that was logged."""
        with suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.work / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    @property
    def checkpoints(self) -> Path:
        return self.work / "out" / "checkpoints"

    def saved(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))

    def saving(self) -> bool:
        """Return True if a checkpoint newer than all complete ones is being written."""
        done = self.saved()
        return any(int(p.name.removeprefix(".step-")) > max(done, default=0) for p in self.checkpoints.glob(".step-*"))


def verify_resume(arguments: list[str]) -> int:
    parser = Parser("verify-resume", "STAGE", least=1, most=1)
    parser.add_argument("--steps", type=int, default=40, help="how many to train, at least 10 (default: 40)")
    flags = parser.parse(arguments)
    if flags.steps < 10:
        raise UserError(f"is {flags.steps}", "--steps", "It must be at least 10.")
    say = partial(print, flush=True)
    return 0 if verify(Session.open(flags.overrides), flags.names[0], flags.steps, say) else 1


def verify(session: Session, name: str, steps: int, say: Say, seed: int | None = None) -> bool:
    """Train twice, the second time killed in the middle and again while saving. Returns True if all is equal.

    Raises UserError for a stage that trains nothing or whose inputs are missing, StageFailed if training fails.
    """
    inputs, stage = trial_stage(session, name, steps)
    draw = random.Random(seed)
    (session.store.root / "work").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=session.store.root / "work"))
    lock = Lock(session.store.root / "locks" / f"{folder.name}.lock", {"stage": name})  # without it, `gc` cleans up
    try:
        with lock:
            say(f"{name}: {stage.params.steps} steps without interruption")
            straight = Trial(session, stage, inputs, folder / "straight")
            finish(straight)
            killed = Trial(session, stage, inputs, folder / "killed")
            interrupt(killed, draw, say)
            finish(killed)
            return compare(straight, killed, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trial_stage(session: Session, name: str, steps: int) -> tuple[dict[str, Path], Stage]:
    """The folders that the stage reads, and the stage cut to a few steps, deterministic and saving often."""
    session.dag.check_names([name], "verify-resume")
    made = session.plan(online=False, targets=[name])
    stage = made.steps[name].stage
    if not hasattr(stage.params, "steps"):
        raise UserError("trains nothing", name, "Name a stage that does: pretrain, midtrain, sft or rl.")
    check_launch(stage, session.dag)
    artifacts = {key: made.steps[source].artifact for key, source in stage.inputs.items()}
    if missing := [stage.inputs[key] for key, artifact in artifacts.items() if artifact is None]:
        there = f"Make them: `python flows.py 'pipeline.targets=[{','.join(missing)}]'`."
        raise UserError(f"reads {', '.join(missing)}, which the store does not have", name, there)
    inputs = {key: session.store.open(artifact) for key, artifact in artifacts.items() if artifact is not None}
    few = min(steps, stage.params.steps or steps)
    horizon: dict[str, Any] = {"tokens": None} if hasattr(stage.params, "tokens") else {}
    often: dict[str, Any] = {"save_every": few // SAVES, "log_every": 1, "resume": "latest", "keep_last": 2}
    how = dataclasses.replace(stage.launch, deterministic=True, **often)
    params = dataclasses.replace(stage.params, steps=few, **horizon)
    return inputs, dataclasses.replace(stage, params=params, launch=how)


def finish(trial: Trial) -> None:
    outcome = trial.run()
    if outcome.status != "done":
        log = trial.work.parent.parent / f"{trial.work.parent.name}.log.txt"
        shutil.copyfile(trial.work / "log.txt", log)
        raise StageFailed(trial.stage.name, outcome.cause or "unknown", outcome.message, str(log))


def interrupt(trial: Trial, draw: random.Random, say: Say) -> None:
    """Kill it at a random step after its first checkpoint, resume it, and kill it while it saves.

    Raises UserError if no kill hit a save: there is then nothing to compare.
    """
    steps, every = trial.stage.params.steps, trial.stage.launch.save_every or 1
    wanted = draw.randint(every + 1, max(every + 1, steps - 2 * every))
    outcome = trial.run(lambda step: step >= wanted and bool(trial.saved()))
    if outcome.status == "done":
        raise UserError(f"ended before it could be killed at step {wanted}", trial.stage.name, "Set more --steps.")
    say(f"killed with -9 at step {trial.step}; checkpoints of steps: {_listed(trial.saved())}")
    for _ in range(KILLS_TRIED):
        outcome = trial.run(lambda step: trial.saving())
        if outcome.status == "done":
            break
        if trial.saving():
            complete = f"complete checkpoints: {_listed(trial.saved())}"
            say(f"killed with -9 again while saving, at step {trial.step}; {complete}")
            return
    raise UserError("no kill hit a save, because saves are too fast", trial.stage.name, "Try again.")


def compare(straight: Trial, killed: Trial, say: Say) -> bool:
    """Compare every tensor of the last checkpoint and of the model, and every metric that time does not influence."""
    lasts = [trial.checkpoints / f"step-{trial.saved()[-1]:07d}" for trial in (straight, killed)]
    good = True
    for path in [*sorted(lasts[0].glob("*.safetensors")), straight.work / "out" / "model.safetensors"]:
        other = lasts[1] / path.name if path.parent == lasts[0] else killed.work / "out" / path.name
        count, wrong = differing_tensors(path, other)
        good &= not wrong
        where = f"{path.parent.name}/{path.name}"
        say(f"{where}: {count} tensors, " + (f"DIFFERENT: {', '.join(wrong[:5])}" if wrong else "equal to the bit"))
    lines, wrong = differing_metrics(straight.work / "metrics.jsonl", killed.work / "metrics.jsonl")
    good &= not wrong
    say(f"metrics.jsonl: {lines} lines, " + (f"DIFFERENT at {', '.join(wrong[:5])}" if wrong else "equal"))
    here = hardware.describe()
    processes = plural(straight.stage.launch.nproc, "process")
    machine = f"{processes} on {plural(here['gpus'], 'GPU') if here['gpus'] else 'no GPU'}, {here['cpu']}"
    say(f"{straight.stage.name}: {'exact' if good else 'NOT exact'} on {machine}")
    return good


def differing_tensors(one: Path, other: Path) -> tuple[int, list[str]]:
    """The number of tensors, and the names of those whose bits differ."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    wrong = sorted(set(a) ^ set(b))
    for name in sorted(set(a) & set(b)):
        same = a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
        if not same or not torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)):
            wrong.append(name)
    return len(set(a) | set(b)), wrong


def differing_metrics(one: Path, other: Path) -> tuple[int, list[str]]:
    """The number of lines, and "step N: NAME" for each difference."""
    a, b = (_metrics(path) for path in (one, other))
    wrong = [f"{len(a)} and {len(b)} lines"] if len(a) != len(b) else []
    for left, right in zip(a, b):
        wrong += [f"step {left['step']}: {name}" for name in left | right if left.get(name) != right.get(name)]
    return len(a), wrong


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(MEASURED)} for line in lines]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
