"""verify-resume kills for real, and what it finds equal or different is so."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import typed
from pipeline.commands.verify_resume import Trial, compare, finish, interrupt
from pipeline.job import Launch
from pipeline.plan.dag import Stage
from pipeline.stages import pretrain
from tests.conftest import Chatmill
from tests.pipeline.trained import TINY_MODEL, write_inputs


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Trial, list[str]]:
    """One run without a stop and one that was killed twice, and what was said."""
    folder = tmp_path_factory.mktemp("trials")
    made = write_inputs(folder / "inputs")
    params = {"model": TINY_MODEL, "total_batch_tokens": 512, "steps": 15, "val_tokens": 512, "eval_every": 5}
    stage = Stage(
        "pretrain",
        "pipeline.stages.pretrain",
        {},
        typed.build(pretrain.Params, params, "pretrain.params"),
        Launch(device="cpu", threads=1, deterministic=True, save_every=3, log_every=1),
    )
    inputs = {name: Path(made[name]) for name in ("tokens", "pack", "tokenizer")}
    session = SimpleNamespace(store=SimpleNamespace(root=folder))
    straight, killed = (Trial(session, stage, inputs, folder / name) for name in ("straight", "killed"))
    said: list[str] = []
    finish(straight)
    interrupt(killed, random.Random(0), said.append)
    finish(killed)
    return straight, killed, said


def test_what_was_killed_in_the_middle_and_while_saving_is_equal_to_the_bit(trials):
    straight, killed, said = trials
    assert [line.partition(" at ")[0] for line in said] == ["killed with -9", "killed with -9 again while saving,"]
    compared: list[str] = []
    assert compare(straight, killed, compared.append)
    assert "metrics.jsonl: 18 lines, equal" in compared  # 15 steps and 3 evaluations
    assert sum("equal to the bit" in line for line in compared) == 3 and "pretrain: exact on" in compared[-1]


def test_one_bit_of_a_weight_and_one_of_a_metric_are_found(trials):
    straight, killed, _ = trials
    weights = load_file(killed.work / "out" / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, killed.work / "out" / "model.safetensors")
    metrics = killed.work / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[4]["loss"] += 1e-15
    lines[5]["tok_s"] = 0.0  # a measurement of time may differ
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared: list[str] = []
    assert not compare(straight, killed, compared.append)
    assert f"out/model.safetensors: {len(weights)} tensors, DIFFERENT: {name}" in compared
    assert f"metrics.jsonl: 18 lines, DIFFERENT at step {lines[4]['step']}: loss" in compared


def test_a_stage_that_cannot_be_tried_is_the_users_mistake(chatmill: Chatmill):
    for name, said in [("pack", "trains nothing"), ("sft", "reads midtrain"), ("sfd", "sft")]:
        assert said in chatmill.run("verify-resume", name, code=2)
    assert "It must be at least 10" in chatmill.run("verify-resume", "pretrain", "--steps", "3", code=2)
