"""What docs/extending.md says works: its examples are run as a reader would run them, in fewer steps."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
COMMANDS = re.findall(
    r"^    python \.\./\.\./flows\.py (.*)$", (ROOT / "docs" / "extending.md").read_text(), re.MULTILINE
)


@pytest.fixture(autouse=True)
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_can_be_planned(command: str, tmp_path: Path) -> None:
    arguments = [word for word in shlex.split(command) if word != "plan"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "flows.py"), "plan", *arguments, f"store.root={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages would run" in done.stdout


def test_the_page_names_every_example() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(files) >= 6
    for path in files:
        assert f"(examples/{path.relative_to(EXAMPLES)})" in text, path


def test_items_of_the_task_are_graded_and_its_splits_share_none() -> None:
    parity = importlib.import_module("parity").Parity
    train, test = parity(size=200), parity("test", size=200)
    assert not {train.number(i) for i in range(200)} & {test.number(i) for i in range(200)}
    for i in range(20):
        right = train.conversation(i)["messages"][-1]["content"]
        assert (train.grade(i, f" {right}\n"), train.grade(i, "maybe")) == (1.0, 0.0)


def test_the_gated_model_has_as_many_parameters_and_starts_as_the_identity() -> None:
    from model.config import GPTConfig
    from model.gpt import new_model

    settings = {"depth": 2, "width": 96, "head_dim": 16, "sequence_len": 32, "vocab_size": 64}
    base, gated = (new_model(GPTConfig(**settings, arch=arch).resolved(64), 0) for arch in ("base", "gated.Gated"))
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in base.parameters())
    assert not gated.layers[0].mlp.fc2.weight.any()


@pytest.mark.full
def test_optimiser_architecture_recipe_and_stage_work_in_one_run(tmp_path: Path) -> None:
    overrides = [
        "--config-dir",
        "conf",
        "recipe=small",
        "+stage@frequencies=frequencies",
        "pipeline.targets=[frequencies,pretrain]",
        "optim=adamw",
        "optim.name=sign_momentum.SignMomentum",
        "+optim.args.beta=0.95",
        "optim.matrix_lr=0.0003",
        "pretrain.params.steps=60",
        "pretrain.params.total_batch_tokens=2048",
        "pretrain.params.eval_every=0",
        f"store.root={tmp_path}",
    ]
    done = subprocess.run([sys.executable, str(ROOT / "flows.py"), *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    artifacts = tmp_path / "artifacts"
    (listed,) = (json.loads(path.read_text()) for path in artifacts.glob("frequencies/*/frequencies.json"))
    assert len(listed) == 100 and listed[0][1] >= listed[-1][1] > 0
    (model,) = (json.loads(path.read_text()) for path in artifacts.glob("pretrain/*/model.json"))
    assert (model["arch"], model["depth"]) == ("gated.Gated", 2)
    (log,) = artifacts.glob("pretrain/*/metrics.jsonl")
    losses = [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
