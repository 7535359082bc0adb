"""Training that is killed and resumed ends with the bits of training that was never stopped."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import LENGTH, TINY_MODEL, StageRun, write_inputs

from model.training.checkpoint import MARKER, folder_of, sha256, steps_in
from pipeline.commands.verify_resume import differing_metrics, differing_tensors
from tests.pipeline.test_rl import make_run as make_rl_run
from tests.pipeline.test_rl import write_inputs as write_rl_inputs

STEPS = 24
TRIES = 5
TRAINED = ("pretrain", "midtrain", "sft", "rl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Little text, so that the steps cross the end of an epoch."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), tokens=9_000)


def pretrain(folder: Path, inputs: dict[str, str], **launch) -> StageRun:
    params = {
        "model": TINY_MODEL | {"dropout": 0.1, "arch": "modern"},
        "optim": {"normuon": True},
        "total_batch_tokens": 512,
        "steps": STEPS,
        "max_epochs": 3,
        "eval_every": 8,
        "val_tokens": 512,
    }
    chosen = {name: inputs[name] for name in ("tokens", "pack", "tokenizer")}
    defaults = {"log_every": 1, "save_every": 4, "deterministic": True}
    return StageRun("pretrain", folder, chosen, params, defaults | launch)


def finetune(folder: Path, inputs: dict[str, str], model: StageRun, *names: str) -> StageRun:
    params = {"total_batch_tokens": 8 * LENGTH, "steps": STEPS, "dropout": 0.1, "lr_frac": 0.1}
    params |= {"eval_every": 6, "val_tokens": 512}
    chosen = {"model": str(model.work / "out")} | {name: inputs[name] for name in ("rows", "tokenizer", *names)}
    return StageRun("finetune", folder, chosen, params, {"log_every": 1, "save_every": 4, "deterministic": True})


def kill_when(run: StageRun, condition, nproc: int = 1) -> bool:
    """Start, wait for the condition, kill -9 all of its processes; whether that is what ended them."""
    process = run.start(nproc)
    while not condition():
        try:
            process.wait(timeout=0.002)
            break
        except subprocess.TimeoutExpired:
            continue
    for worker in processes_of(run.work):  # torchrun's workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    process.communicate()
    while processes_of(run.work):
        continue
    return process.returncode == -signal.SIGKILL


def processes_of(work: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(work) in " ".join(p.info["cmdline"] or [])]


def last_logged(run: StageRun) -> int:
    """The step; 0 while nothing is."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run.work / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def is_saving(run: StageRun, after: int) -> bool:
    return any(int(path.name.removeprefix(".step-")) > after for path in checkpoints(run).glob(".step-*"))


def assert_same_bits(run: StageRun, straight: StageRun) -> None:
    """Model, optimiser state and generators of the last checkpoint, every metric that is no measurement of time."""
    for wanted in [*last(straight).glob("*.safetensors"), straight.work / "out" / "model.safetensors"]:
        count, wrong = differing_tensors(wanted, run.work / wanted.relative_to(straight.work))
        assert count and not wrong, wanted.name
    lines, wrong = differing_metrics(straight.work / "metrics.jsonl", run.work / "metrics.jsonl")
    assert lines >= straight.params["steps"] and not wrong


def checkpoints(run: StageRun) -> Path:
    return run.work / "out" / "checkpoints"


def last(run: StageRun) -> Path:
    return folder_of(checkpoints(run), steps_in(checkpoints(run))[-1])


def finish(run: StageRun, nproc: int) -> str:
    """Run to the end, in this very process if it is one; what was said."""
    if nproc == 1:
        run.inside()
        return run.said()
    outcome = run.run(nproc)
    assert outcome["status"] == "done", outcome["output"]
    return outcome["output"]


def killed_twice(run: StageRun, nproc: int) -> str:
    """Killed at a random step, killed while saving, then run to the end. On a busy machine a kill may come too late."""
    steps, every = run.params["steps"], run.launch["save_every"]
    for _ in range(TRIES):
        wanted = random.randint(every + 1, steps - 2 * every)
        killed = kill_when(run, lambda: last_logged(run) >= wanted and steps_in(checkpoints(run)), nproc)  # noqa: B023
        if killed and 0 < steps_in(checkpoints(run))[-1] < steps and kill_while_saving(run, nproc):
            return finish(run, nproc)
        shutil.rmtree(run.work)
    raise AssertionError(f"in {TRIES} tries no kill came in time")


def kill_while_saving(run: StageRun, nproc: int) -> bool:
    """Whether a checkpoint was left half written."""
    reached = max(steps_in(checkpoints(run)), default=0)
    return kill_when(run, lambda: is_saving(run, reached), nproc) and is_saving(run, reached)


@pytest.fixture(scope="module")
def make(tmp_path_factory, inputs, straight):
    """A training of each kind, by name, in the folder given."""
    rl_inputs = write_rl_inputs(tmp_path_factory.mktemp("rl"))
    return {
        "pretrain": lambda folder: pretrain(folder, inputs),
        "midtrain": lambda folder: finetune(folder, inputs, straight, "tokens"),
        "sft": lambda folder: finetune(folder, inputs, straight),
        "rl": lambda folder: make_rl_run(rl_inputs, folder),
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory, inputs) -> StageRun:
    run = pretrain(tmp_path_factory.mktemp("straight") / "run", inputs)
    run.inside()
    return run


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory, inputs) -> StageRun:
    run = pretrain(tmp_path_factory.mktemp("straight on two") / "run", inputs)
    finish(run, 2)
    return run


CASES = [("pretrain", 1), ("sft", 1), ("rl", 1)]
CASES += [pytest.param("midtrain", 1, marks=pytest.mark.full)]
CASES += [pytest.param(stage, 2, marks=pytest.mark.full) for stage in TRAINED]


@pytest.mark.parametrize("stage, nproc", CASES)
def test_killed_at_a_random_step_and_again_while_saving_ends_with_the_same_bits(stage, nproc, make, request, tmp_path):
    if stage == "pretrain":
        whole = request.getfixturevalue("straight" if nproc == 1 else "straight_on_two")
    else:
        whole = make[stage](tmp_path / "whole")
        finish(whole, nproc)
    run = make[stage](tmp_path / "run")
    said = killed_twice(run, nproc)
    assert "continues from the checkpoint" in said
    assert "rounding" not in said
    assert_same_bits(run, whole)


def test_two_processes_agree_on_the_step_to_stop_at_and_stopped_and_killed_while_saving_end_with_the_same_bits(
    inputs, straight_on_two, tmp_path
):
    run = pretrain(tmp_path / "run", inputs)
    run.work.mkdir()
    (run.work / "stop").touch()  # each rank looks by itself
    outcome = run.run(2)
    assert outcome["status"] == "stopped" and outcome["message"] == f"checkpoint at step 0 of {STEPS}"
    (run.work / "stop").unlink()
    for _ in range(TRIES):
        if kill_while_saving(run, 2):
            break
        shutil.rmtree(run.work)
    else:
        raise AssertionError(f"in {TRIES} tries no kill came in time")
    finish(run, 2)
    assert_same_bits(run, straight_on_two)


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.full)])
def test_a_run_goes_on_with_other_processes_and_says_what_that_means(inputs, tmp_path, before, after):
    whole, run = pretrain(tmp_path / "whole", inputs), pretrain(tmp_path / "run", inputs)
    whole.params = run.params = run.params | {"model": TINY_MODEL}  # other processes would drop out other numbers
    finish(whole, after)
    assert kill_when(run, lambda: last_logged(run) >= 9, before)
    assert f"world_size {before} -> {after}" in finish(run, after)
    for name, weight in whole.weights().items():
        assert float((run.weights()[name] - weight).norm() / weight.norm()) < 1e-5, name


@pytest.mark.parametrize("dropped", ["rng.torch", "momentum", "exp_avg"])
def test_without_a_part_of_the_checkpoint_the_bits_are_others(straight, inputs, tmp_path, dropped):
    """The negative control: each part of a checkpoint is needed for what the tests above find."""
    run = pretrain(tmp_path / "run", inputs)
    shutil.copytree(straight.work, run.work)
    shutil.rmtree(folder_of(checkpoints(run), STEPS))
    forget(last(run), dropped)
    run.inside()
    assert any(not torch.equal(run.weights()[name], weight) for name, weight in straight.weights().items())


def forget(checkpoint: Path, part: str) -> None:
    """Overwrite a part of the state, and the checksum so that nobody notices."""
    path = checkpoint / "state-0.safetensors"
    state = load_file(path)
    chosen = [name for name in state if part in name]
    assert chosen
    for name in chosen:
        state[name] = torch.get_rng_state() if part == "rng.torch" else torch.zeros_like(state[name])
    save_file(state, path)
    about = json.loads((checkpoint / MARKER).read_text())
    about["files"][path.name]["sha256"] = sha256(path)
    (checkpoint / MARKER).write_text(json.dumps(about))


def test_resume_never_begins_anew_and_a_step_goes_back_to_it(straight, inputs, tmp_path):
    """Beside the negative control: with nothing dropped, the bits are the same."""
    run = pretrain(tmp_path / "run", inputs)
    shutil.copytree(straight.work, run.work)
    run.inside(resume=steps_in(checkpoints(run))[0])
    assert "checkpoint of step 20" in run.said()
    assert_same_bits(run, straight)
    run.inside(resume="never")
    assert_same_bits(run, straight)
