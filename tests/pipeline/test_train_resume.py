"""Training that is killed and resumed ends with the bits of training that was never stopped."""

import contextlib
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import LENGTH, TINY_MODEL, StageRun, write_inputs

from model.checkpoint import MARKER, folder_of, sha256, steps_in

STEPS = 24
TRIES = 5


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


def finetune(folder: Path, inputs: dict[str, str], model: StageRun) -> StageRun:
    params = {"total_batch_tokens": 8 * LENGTH, "steps": STEPS, "dropout": 0.1, "lr_frac": 0.1}
    chosen = {"model": str(model.work / "out"), "rows": inputs["rows"], "tokenizer": inputs["tokenizer"]}
    return StageRun("finetune", folder, chosen, params, {"log_every": 1, "save_every": 4, "deterministic": True})


def kill_when(run: StageRun, condition, nproc: int = 1) -> bool:
    """Start, wait for the condition, kill -9 all of its processes; whether they were alive until then."""
    process = run.start(nproc)
    while not condition():
        try:
            process.wait(timeout=0.002)
            break
        except subprocess.TimeoutExpired:
            continue
    alive = process.poll() is None
    for worker in processes_of(run.work):  # torchrun's workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    process.communicate()
    while processes_of(run.work):
        continue
    return alive


def processes_of(work: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(work) in " ".join(p.info["cmdline"] or [])]


def last_logged(run: StageRun) -> int:
    path = run.work / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_saving(run: StageRun, after: int) -> bool:
    folder = run.work / "out" / "checkpoints"
    return any(int(path.name.removeprefix(".step-")) > after for path in folder.glob(".step-*"))


def assert_same_bits(run: StageRun, straight: StageRun) -> None:
    """Model, optimiser state and generators of the last checkpoint, every metric that is no measurement of time."""
    for name in sorted(path.name for path in last(straight).glob("*.safetensors")):
        wanted, found = load_file(last(straight) / name), load_file(last(run) / name)
        assert set(wanted) == set(found)
        assert not [key for key in wanted if not torch.equal(wanted[key], found[key])], name
    assert all(torch.equal(run.weights()[name], weight) for name, weight in straight.weights().items())
    for names in (["loss", "loss_smooth", "grad_norm", "lr/matrix", "lr/embedding", "tokens", "epoch"], ["val_bpb"]):
        assert run.metrics(*names) == straight.metrics(*names)


def last(run: StageRun) -> Path:
    folder = run.work / "out" / "checkpoints"
    return folder_of(folder, steps_in(folder)[-1])


def killed_twice(run: StageRun, nproc: int = 1) -> dict:
    """Killed in the middle, killed while saving, then run to the end. On a busy machine a kill may come too late."""
    folder = run.work / "out" / "checkpoints"
    for _ in range(TRIES):
        killed = kill_when(run, lambda: last_logged(run) >= 9, nproc)
        if killed and 0 < steps_in(folder)[-1] < STEPS and kill_while_saving(run, nproc):
            return run.run(nproc)
        shutil.rmtree(run.work)
    raise AssertionError(f"in {TRIES} tries no kill came in time")


def kill_while_saving(run: StageRun, nproc: int) -> bool:
    folder = run.work / "out" / "checkpoints"
    reached = steps_in(folder)[-1]
    return kill_when(run, lambda: is_saving(run, reached), nproc) and bool(list(folder.glob(".step-*")))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, inputs) -> StageRun:
    run = pretrain(tmp_path_factory.mktemp("straight") / "run", inputs)
    assert run.run()["status"] == "done"
    return run


def test_pretrain_killed_twice_ends_with_the_same_bits(straight, inputs, tmp_path):
    run = pretrain(tmp_path / "run", inputs)
    outcome = killed_twice(run)
    assert outcome["status"] == "done" and "continues from the checkpoint" in outcome["output"]
    assert "rounding" not in outcome["output"]
    assert_same_bits(run, straight)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.full)])
def test_finetune_killed_twice_ends_with_the_same_bits(straight, inputs, tmp_path, nproc):
    whole = finetune(tmp_path / "whole", inputs, straight)
    assert whole.run(nproc)["status"] == "done"
    run = finetune(tmp_path / "run", inputs, straight)
    assert killed_twice(run, nproc)["status"] == "done"
    assert_same_bits(run, whole)


def test_two_processes_stopped_and_killed_end_with_the_same_bits(inputs, tmp_path):
    whole = pretrain(tmp_path / "whole", inputs)
    assert whole.run(2)["status"] == "done"
    run = pretrain(tmp_path / "run", inputs, save_every=1000)
    run.work.mkdir()
    (run.work / "stop").touch()  # each rank looks by itself; they agree on a step
    outcome = run.run(2)
    assert outcome["status"] == "stopped" and outcome["message"] == f"checkpoint at step 0 of {STEPS}"
    (run.work / "stop").unlink()
    run.launch["save_every"] = 4
    assert kill_when(run, lambda: last_logged(run) >= 9, nproc=2)
    assert run.run(2)["status"] == "done"
    assert_same_bits(run, whole)


def test_a_run_goes_on_with_other_processes_and_says_what_that_means(straight, inputs, tmp_path):
    run = pretrain(tmp_path / "run", inputs)
    run.params = run.params | {"model": TINY_MODEL}  # dropout would draw other numbers in another number of processes
    alone = pretrain(tmp_path / "alone", inputs)
    alone.params = run.params
    alone.inside()
    assert kill_when(run, lambda: last_logged(run) >= 9, nproc=2)
    outcome = run.run(1)
    assert outcome["status"] == "done" and "world_size 2 -> 1" in outcome["output"]
    for name, weight in alone.weights().items():
        assert float((run.weights()[name] - weight).norm() / weight.norm()) < 1e-2, name
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dropped", ["rng.torch", "momentum", "exp_avg"])
def test_without_a_part_of_the_checkpoint_the_bits_are_others(straight, inputs, tmp_path, dropped):
    """The negative control: each part of a checkpoint is needed for what the tests above find."""
    run = pretrain(tmp_path / "run", inputs)
    shutil.copytree(straight.work, run.work)
    folder = run.work / "out" / "checkpoints"
    shutil.rmtree(folder_of(folder, STEPS))
    forget(folder_of(folder, steps_in(folder)[-1]), dropped)
    try:
        run.inside()
    finally:
        torch.use_deterministic_algorithms(False)
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


def test_all_of_it_is_there_otherwise(straight, inputs, tmp_path):
    """Beside the negative control: the same, with nothing dropped, in this very process."""
    run = pretrain(tmp_path / "run", inputs)
    shutil.copytree(straight.work, run.work)
    folder = run.work / "out" / "checkpoints"
    shutil.rmtree(folder_of(folder, STEPS))
    try:
        run.inside()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (
        hashlib.sha256((run.work / "out" / "model.safetensors").read_bytes()).digest()
        == hashlib.sha256((straight.work / "out" / "model.safetensors").read_bytes()).digest()
    )


def test_resume_never_begins_anew_and_a_step_goes_back_to_it(straight, inputs, tmp_path):
    run = pretrain(tmp_path / "run", inputs)
    shutil.copytree(straight.work, run.work)
    try:
        run.inside(resume=steps_in(run.work / "out" / "checkpoints")[0])
        assert "checkpoint of step 20" in run.said()
        assert_same_bits(run, straight)
        run.inside(resume="never")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(run, straight)
