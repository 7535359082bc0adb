"""Checkpoints in one process: what is kept, what is trusted, and what happens when the disk does not play along."""

import errno
import json
import os
import random
import resource
import signal
import threading
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from small import ALONE, CPU, batch, small_model

from model.config import OptimConfig
from model.distributed import seed_everything
from model.errors import ModelError
from model.optim.optimiser import Optimizer
from model.optim.schedule import Rates
from model.training import checkpoint as saving
from model.training.checkpoint import Checkpointer, Keep, capture_rng, folder_of, remove, restore_rng, steps_in
from model.training.resume import Shards, damage_of, find, restore


class Run:
    """A small model in training, with a folder for its checkpoints."""

    def __init__(self, folder, keep=Keep(), seed=0, **optim):  # noqa: B008 - frozen
        self.words: list[str] = []
        self.model = small_model(seed=seed, arch="modern")
        self.optimizer = Optimizer(self.model, OptimConfig(**optim), 32, ALONE)
        self.saver = Checkpointer(folder, ALONE, "key", keep, self.words.append)
        self.folder = folder

    def train(self, first, last):
        for step in range(first, last):
            self.model.loss(*batch(seed=step)).backward()
            self.optimizer.step(Rates(1.0, 0.9, 1.0), 1 / 72)
        return self

    def save(self, *steps):
        for step in steps:
            self.saver.save(step, self.model, self.optimizer, {"step": step})
        self.saver.wait()
        return self

    def resume(self, wanted="latest"):
        found = find(self.folder, wanted, ALONE, self.words.append)
        restore(found, self.model, self.optimizer, ALONE)
        return found

    def weights(self):
        return {name: weight.clone() for name, weight in self.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "optim",
    [
        {"normuon": True},
        {"name": "adamw"},
        {"name": "lion"},
        {"name": "torch.optim.Adagrad"},
        {"name": "torch.optim.Adafactor"},
    ],
)
def test_a_restored_run_goes_on_to_the_same_bits(tmp_path, optim):
    straight = Run(tmp_path / "a", **optim).train(0, 6).weights()
    Run(tmp_path / "b", **optim).train(0, 3).save(3)
    resumed = Run(tmp_path / "b", seed=5, **optim)
    assert resumed.resume().progress == {"step": 3}
    assert same(straight, resumed.train(3, 6).weights())


def test_the_state_of_the_optimiser_matters(tmp_path):
    """The negative control of the test above."""
    straight = Run(tmp_path / "a").train(0, 6).weights()
    Run(tmp_path / "b").train(0, 3).save(3)
    resumed = Run(tmp_path / "b", seed=5)
    resumed.resume()
    resumed.optimizer.parts[0][1].state["exp_avg"].zero_()
    assert not same(straight, resumed.train(3, 6).weights())


def test_the_newest_and_every_so_many_are_kept(tmp_path):
    Run(tmp_path, Keep(last=2, every=4)).save(1, 2, 3, 4, 5, 6, 7)
    assert steps_in(tmp_path) == [4, 6, 7]


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    run = Run(tmp_path).save(1, 2)
    path = folder_of(tmp_path, 2) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-9]), "lose": path.unlink}[
        damage
    ]()
    assert run.resume().step == 1
    assert "step 2 cannot be used" in run.words[-1] and "model.safetensors" in run.words[-1]
    with pytest.raises(ModelError, match="no good checkpoint of step 2"):
        run.resume(2)


def test_what_was_left_by_a_save_that_did_not_end_is_no_checkpoint(tmp_path):
    run = Run(tmp_path).save(1)
    half = tmp_path / ".step-0000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    folder_of(tmp_path, 3).mkdir()  # its marker was removed first
    assert run.resume().step == 1
    assert run.save(2).resume().step == 2


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(tmp_path, monkeypatch, when):
    run = Run(tmp_path, Keep(last=1)).save(1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(saving.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        else:
            patch.setattr(saving, "save_file", full)
        run.save(2)
    assert "step 2 could not be saved" in run.words[-1] and "the one of step 1 stays" in run.words[-1]
    assert "space left" in run.words[-1] and steps_in(tmp_path) == [1] and run.saver.last_step == 1
    assert not list(tmp_path.glob(".step*"))
    assert run.save(3).saver.last_step == 3 and steps_in(tmp_path) == [3]


def test_a_folder_that_cannot_be_made_keeps_the_previous_checkpoint_and_says_so(tmp_path, monkeypatch):
    """And meets the other processes as often as ever: they would be one meeting behind for the rest of the run."""
    run, met = Run(tmp_path).save(1), []

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving.World, "meet_aside", lambda _, value: met.append(value) or value)
        patch.setattr(saving.Path, "mkdir", refuse)
        run.save(2)
    assert met == [0, 1] and run.saver.last_step == 1
    assert "step 2 could not be saved" in run.words[-1] and "No space left" in run.words[-1]
    assert run.save(3).saver.last_step == 3


@pytest.mark.parametrize("call", range(30))
def test_a_step_that_is_saved_already_is_never_lost_by_saving_it_again(tmp_path, monkeypatch, call):
    """As when a run is asked to stop right after it saved or went on, and killed in the middle of that."""
    run, calls = Run(tmp_path).save(1), []

    class Killed(BaseException):
        pass

    def until_killed(function):
        def counted(*args, **kwargs):
            calls.append(function)
            if len(calls) > call:
                raise Killed
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (saving, "save_file")):
            patch.setattr(owner, name, until_killed(getattr(owner, name)))
        run.save(1)
    assert Run(tmp_path, seed=1).resume().step == 1


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    Run(tmp_path).train(0, 1).save(1).train(1, 2).save(2)
    weights = tmp_path / "step-0000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    again = Run(tmp_path, seed=1)
    again.saver.last_step = again.resume().step
    assert again.saver.last_step == 1
    again.train(1, 2).save(2)
    assert Run(tmp_path, seed=1).resume().step == 2


@contextmanager
def files_of_at_most_10_kb():
    """What a quota does: the system refuses to write on. That goes for the output of the tests too, if it is a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_write_that_the_system_refuses_keeps_the_previous_checkpoint_and_training_goes_on(tmp_path):
    run = Run(tmp_path, Keep(last=1)).save(1)
    run.train(0, 1)
    with files_of_at_most_10_kb():
        run.save(2)
    assert "step 2 could not be saved" in run.words[-1] and "the one of step 1 stays" in run.words[-1]
    assert steps_in(tmp_path) == [1] and not list(tmp_path.glob(".step*"))
    assert run.resume().step == 1


def test_weights_that_are_no_numbers_push_no_good_checkpoint_out(tmp_path):
    run = Run(tmp_path, Keep(last=1)).save(1)
    run.model.lm_head.weight.data[3, 3] = float("nan")
    run.save(2)
    assert steps_in(tmp_path) == [1] and "lm_head.weight holds NaN" in run.words[-1]


def test_training_goes_on_while_the_copy_is_written(tmp_path):
    run = Run(tmp_path).train(0, 2)
    expected = run.weights()
    run.saver.save(2, run.model, run.optimizer, {})
    run.train(2, 4)
    run.saver.wait()
    run.resume()
    assert same(expected, run.weights())


def test_a_checkpoint_of_another_model_or_optimiser_is_refused(tmp_path):
    Run(tmp_path).save(1)
    other = Run(tmp_path, name="adamw")
    with pytest.raises(ModelError, match="another optimiser"):
        other.resume()
    other.model = small_model(depth=3)
    with pytest.raises(ModelError, match="other parameters"):
        other.resume()


def test_never_and_an_empty_folder_start_from_nothing(tmp_path):
    assert find(tmp_path, "latest", ALONE, print) is None
    Run(tmp_path).save(1)
    assert find(tmp_path, "never", ALONE, print) is None


def test_the_marker_names_every_file_with_its_checksum(tmp_path):
    Run(tmp_path).save(1)
    about = json.loads((folder_of(tmp_path, 1) / "checkpoint.json").read_text())
    assert set(about["files"]) == {"model.safetensors", "state-0.safetensors"}
    assert about["key"] == "key" and not damage_of(folder_of(tmp_path, 1))


DAMAGES = ["", "{", "[]", "null", "7", "[" * 100_000, "{}"]


@pytest.mark.parametrize(
    "change", ["a folder", *DAMAGES, *({name: "x"} for name in ("step", "progress", "conditions", "files"))]
)
def test_a_damaged_marker_is_passed_over_for_the_checkpoint_before(tmp_path, change):
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    marker = folder_of(tmp_path, 2) / "checkpoint.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(marker.read_text()) | change)
    if change == "a folder":
        marker.unlink()
        marker.mkdir()
    else:
        marker.write_text(text)
    said = []
    found = find(tmp_path, "latest", ALONE, said.append)
    assert found is not None and found.step == 1
    assert "step 2 cannot be used" in said[0]
    remove(folder_of(tmp_path, 2))
    assert steps_in(tmp_path) == [1]


def test_state_is_read_across_the_pieces_of_other_ranks(tmp_path):
    run = Run(tmp_path).train(0, 1).save(1)
    found = find(tmp_path, "latest", ALONE, print)
    with ExitStack() as stack:
        shards = Shards(found, stack)
        name, _, whole = next(p for p in run.optimizer.pieces() if p[0] == "lm_head.weight.exp_avg")
        shards.held[name] = [(0, 0, f"{name}@0")]
        assert torch.equal(shards.read(name, 100, 50), whole[100:150])
        with pytest.raises(ModelError):
            shards.read(name, len(whole) - 5, 10)


def test_generators_draw_on_where_they_were():
    seed_everything(3, rank=0)
    random.gauss(0, 1)
    np.random.normal()
    state = capture_rng(CPU)
    drawn = [random.random(), np.random.random(), np.random.normal(), torch.rand(3).tolist()]
    restore_rng(state, CPU)
    assert drawn == [random.random(), np.random.random(), np.random.normal(), torch.rand(3).tolist()]
    seed_everything(3, rank=1)
    assert drawn[0] != random.random()
