"""evaluate: what the configuration lists is measured once, whatever interrupts it and however many ranks share it."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.errors import DataError, DataMistake
from data.tokens import bpe
from data.tokens.tokenizer import Tokenizer
from evals.sandbox.box import Sandbox
from model.config import GPTConfig
from model.gpt import GPT
from model.saved import write_config
from pipeline.config import compose as config
from pipeline.errors import UserError
from tests.pipeline.trained import StageRun

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = {"task": "data.tasks.arithmetic.Arithmetic", "name": "Sums", "split": "test", "size": 40}
JUDGED = {"task": "tests.toys.vowels.Judged", "size": 1}


def write_model_artifacts(folder: Path) -> dict[str, str]:
    """A tokenizer, a random model that knows it, its validation tokens, and a CORE bundle; as artifact folders."""
    paths = {name: folder / name for name in ("tokenizer", "model", "tokens", "bundle")}
    for path in paths.values():
        path.mkdir(parents=True)
    texts = [path.read_text() for path in sorted((ROOT / "data").rglob("*.py"))]
    tok = bpe.save(bpe.train(texts, 400), paths["tokenizer"])
    write_model(paths["model"], tok)
    stream = np.array([token for text in texts[:4] for token in [tok.bos, *tok.encode(text)]], np.uint16)
    np.save(paths["tokens"] / "v.tokens.npy", stream)
    shard = {"name": "v", "split": "val", "tokens": len(stream), "documents": 4, "sha256": ""}
    described = {"dtype": "uint16", "bos": tok.bos, "vocab_size": tok.vocab_size, "shards": [shard]}
    (paths["tokens"] / "tokens.json").write_text(json.dumps(described))
    write_bundle(paths["bundle"])
    return {
        "model": str(paths["model"]),
        "tokenizer": str(paths["tokenizer"]),
        "tokens": str(paths["tokens"]),
        "dataset/core": str(paths["bundle"]),
    }


def write_model(folder: Path, tok: Tokenizer, **changes: int) -> None:
    sizes = {"depth": 2, "width": 32, "head_dim": 16, "sequence_len": 128} | changes
    model = GPT(GPTConfig(**sizes).resolved(tok.vocab_size))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_config(model.config, folder)


def write_bundle(folder: Path) -> None:
    (folder / "eval_data").mkdir()
    items = [{"query": f"Which is {n}?", "choices": [str(n), str(n + 1)], "gold": 0} for n in range(12)]
    (folder / "eval_data" / "mc.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"label": "mc", "dataset_uri": "mc.jsonl", "num_fewshot": [1], "icl_task_type": "multiple_choice"}
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmc,50\n")


PARAMS = {
    "tasks": [ARITHMETIC],
    "bpb_tokens": 2048,
    "core": {"dataset": "core"},
    "prompts": ["The capital of"],
    "questions": ["Who are you?"],
    "sample_tokens": 8,
    "max_new_tokens": 16,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_model_artifacts(tmp_path_factory.mktemp("inputs"))


def results(run: StageRun) -> dict:
    """results.json without what differs from run to run."""
    found = json.loads((run.work / "out" / "results.json").read_text())
    for part in (found["core"] or {}, *found["chat"].values()):
        for name in [name for name in part if name.startswith("seconds")]:
            part.pop(name)
    return found


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> StageRun:
    return StageRun("evaluate", tmp_path_factory.mktemp("whole"), inputs, PARAMS, {})


@pytest.fixture(scope="module", autouse=True)
def metrics(finished) -> dict:
    """What the finished one returns."""
    return finished.inside()


def test_everything_listed_is_measured(finished, metrics):
    found = results(finished)

    assert found["bpb"]["val"] == metrics["bpb"] > 1
    assert found["core"]["items"] == 12 and metrics["CORE-1/22"] == found["core"]["score"]
    assert found["chat"]["Sums"]["items"] == metrics["Sums items"] == 40
    assert [sample["prompt"] for sample in found["samples"]] == ["The capital of", "Who are you?"]
    assert len(found["conversations"]) == 4 and found["chatcore"] is None


def test_two_ranks_find_the_same(inputs, finished, tmp_path):
    run = StageRun("evaluate", tmp_path, inputs, PARAMS, {})
    outcome = run.run(nproc=2)

    assert outcome["status"] == "done", outcome["output"]
    assert results(run) == results(finished)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_an_interrupted_evaluation_goes_on(inputs, finished, tmp_path, how):
    run = StageRun(
        "evaluate", tmp_path, inputs, PARAMS | {"tasks": [ARITHMETIC | {"size": 40}]}, {"device_batch_size": 2}
    )
    ledger = tmp_path / "scratch" / "ledger-2048-strict" / "ledger.0.jsonl"
    process = run.start()
    while process.poll() is None and not (ledger.exists() and ledger.read_text().count("Sums") > 5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    process.send_signal(how)
    process.communicate()
    before = [json.loads(line) for line in ledger.read_text().splitlines()]
    if how == signal.SIGTERM:
        assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "stopped"

    run.inside()

    after = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert 5 < sum(line["group"] == "chat/Sums" for line in before) < 40
    assert after[: len(before)] == before  # what was measured stayed
    assert len({(line["group"], line["item"]) for line in after}) == len(after)  # and nothing was measured twice
    assert results(run) == results(finished)


def test_programs_that_ran_weakly_leave_word_of_what_the_machine_lacked(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "weakness", "a program could read files")
    run = StageRun("evaluate", tmp_path, inputs, {"tasks": [JUDGED]}, {"sandbox": "weak"})

    run.inside()

    found = results(run)
    assert found["sandbox_weakness"] == "a program could read files" and found["chat"]["Judged"]["programs"] == 1


def test_programs_that_cannot_be_confined_end_an_evaluation_before_anything_is_measured(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "weakness", "a program could read files")
    run = StageRun("evaluate", tmp_path, inputs, PARAMS | {"tasks": [ARITHMETIC, JUDGED]}, {})

    with pytest.raises(UserError, match="for Judged cannot be confined: a program could read files"):
        run.inside()

    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "scratch").iterdir())


def test_a_task_that_runs_programs_without_saying_so_ends_an_evaluation_where_they_cannot_be_confined(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(Sandbox, "weakness", "a program could read files")
    tasks = [{"task": "tests.toys.vowels.Undeclared", "size": 1}]

    with pytest.raises(DataMistake, match="task Undeclared: a program could read files"):
        StageRun("evaluate", tmp_path, inputs, {"tasks": tasks}, {}).inside()

    assert not (tmp_path / "out" / "results.json").exists()


def test_programs_skip_leaves_tasks_out_by_name(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "weakness", "a program could read files")
    tasks = [ARITHMETIC | {"size": 1}, JUDGED]
    run = StageRun("evaluate", tmp_path, inputs, {"tasks": tasks, "programs": "skip"}, {})

    run.inside()

    found = results(run)
    assert found["left_out"] == ["Judged"] and list(found["chat"]) == ["Sums"]
    assert "Judged: left out, because programs=skip" in (tmp_path / "said.txt").read_text()


def test_bits_per_byte_without_tokens_is_an_error_that_says_what_to_do(inputs, tmp_path):
    without = {name: path for name, path in inputs.items() if name != "tokens"}

    with pytest.raises(DataError, match="needs the input tokens; add it, or set bpb_tokens to null"):
        StageRun("evaluate", tmp_path, without, PARAMS, {}).inside()


@pytest.mark.parametrize("recipe", ["d12", "d20", "d26", "d32"])
def test_real_recipes_let_an_answer_be_as_long_as_programs_are(recipe):
    stages = config.settings(config.compose([f"recipe={recipe}"])).stages

    found = {stage.params["max_new_tokens"] for stage in stages.values() if stage.run == "pipeline.stages.evaluate"}

    assert found == {512}  # 35 of HumanEval's 164 solutions are longer than 256
