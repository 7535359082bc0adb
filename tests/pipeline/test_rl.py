"""rl: learns from its better answers, on any number of ranks, and is the same run however often it is interrupted."""

import contextlib
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.errors import DataMistake
from data.tasks.mixture import TaskSpec
from data.tokens import bpe
from evals.metrics import wilson
from evals.sandbox.box import Sandbox
from pipeline.errors import UserError
from pipeline.stages import rl
from tests.pipeline.test_evaluate import write_model
from tests.pipeline.trained import StageRun

VOWELS = "tests.toys.vowels.Vowels"
MEASURED = ("seconds", "tok_s", "memory_mb")
PARAMS = {
    "tasks": [{"task": VOWELS, "name": "train"}],
    "eval_tasks": [{"task": VOWELS, "name": "held out", "split": "test", "size": 24}],
    "eval_every": 4,
    "problems": 4,
    "samples": 4,
    "steps": 8,
    "max_new_tokens": 6,
    "lr_frac": 0.2,
}


def write_inputs(folder: Path) -> dict[str, str]:
    """A tokenizer and a model that knows nothing, as artifact folders."""
    for name in ("tokenizer", "model"):
        (folder / name).mkdir()
    text = " ".join(f"{one}{two}" for one in ("see", "tree", "sat", "hum", "lot", "bee") for two in ("ing", "er", "s"))
    write_model(folder / "model", bpe.save(bpe.train([text], 290), folder / "tokenizer"), sequence_len=64)
    return {"model": str(folder / "model"), "tokenizer": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def make_run(inputs, work, **changes) -> StageRun:
    return StageRun("rl", work, inputs, PARAMS | changes, {"deterministic": True, "save_every": 2, "log_every": 2})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> StageRun:
    run = make_run(inputs, tmp_path_factory.mktemp("whole"))
    run.inside()
    return run


def weights(run: StageRun) -> dict[str, torch.Tensor]:
    return load_file(run.work / "out" / "model.safetensors")


def measured(run: StageRun) -> list[dict]:
    lines = [json.loads(line) for line in (run.work / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(MEASURED)} for line in lines]


def test_training_raises_held_out_accuracy(finished):
    accuracy = dict(finished.metrics("eval/held out"))

    assert list(accuracy) == [0, 4, 8] and accuracy[8] > accuracy[0] + 0.2
    ends = zip(*(finished.metrics(f"eval_{end}/held out") for end in ("low", "high")))
    assert [(low, high) for (_, low), (_, high) in ends] == [wilson(found, 24) for found in accuracy.values()]


def test_what_a_step_logs_is_true_to_itself(finished):
    lines = [line for line in measured(finished) if "reward" in line]

    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert 0 <= line["reward"] == line["pass@1"] <= line["pass@4"] <= 1
        assert 0 < line["response_tokens"] <= 6 and 0 <= line["signal"] <= 1
        assert ("entropy" in line) == (line["signal"] > 0) and line.get("entropy", 1) > 0
    assert lines[-1]["skipped_groups"] == round(sum(4 * (1 - line["signal"]) for line in lines))
    assert all(("kl" in line) == (line["step"] % 2 == 0) for line in lines if line["signal"])


def kept_answers(run: StageRun, held_out: bool) -> list[dict]:
    lines = [json.loads(line) for line in (run.work / "out" / "rollouts.jsonl").read_text().splitlines()]
    return [line for line in lines if bool(line.get("held_out")) == held_out]


def test_rollouts_are_kept_to_be_read(finished):
    kept = kept_answers(finished, held_out=False)

    assert [line["step"] for line in kept] == [step for step in range(1, 9) for _ in range(2)]
    assert all(
        line["prompt"].startswith("Say train") and line["reward"] == float("e" in line["completion"]) for line in kept
    )


def test_answers_to_the_same_held_out_problems_are_kept_at_each_evaluation(finished):
    kept = kept_answers(finished, held_out=True)

    assert [(line["step"], line["prompt"]) for line in kept] == [
        (step, prompt) for step in (0, 4, 8) for prompt in ("Say test 0", "Say test 1 again")
    ]
    assert all(line["reward"] == float("e" in line["completion"]) for line in kept)


def test_a_run_that_is_stopped_ends_with_the_same_bits_and_rollouts(inputs, finished, tmp_path):
    run = make_run(inputs, tmp_path)
    stop_at = random.randint(2, 6)
    process = run.start()
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and f'"step": {stop_at}, "rew' in metrics.read_text()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert not (tmp_path / "out" / "model.safetensors").exists()  # it was in the middle

    run.inside()

    assert "continues from the checkpoint" in run.said()
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(finished).items())
    assert measured(run) == measured(finished)
    kept = (run.work / "out" / "rollouts.jsonl").read_text()
    assert kept == (finished.work / "out" / "rollouts.jsonl").read_text()


TWO_UPDATES = pytest.param({"updates": 2, "clip": 0.2}, marks=pytest.mark.full, id="two updates")


@pytest.mark.parametrize("changes", [pytest.param({}, id="plain"), TWO_UPDATES])
def test_two_ranks_make_the_same_model_up_to_rounding(inputs, tmp_path, changes):
    run = make_run(inputs, tmp_path, steps=2, **changes)
    outcome = run.run(nproc=2)
    one = make_run(inputs, tmp_path / "one", steps=2, **changes)
    assert outcome["status"] == "done", outcome["output"]
    one.inside()

    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=1e-4, rtol=1e-3)
    for (_, mine), (_, theirs) in zip(run.metrics("reward"), one.metrics("reward"), strict=True):
        assert mine == pytest.approx(theirs)


def test_a_run_goes_on_from_a_named_checkpoint_of_another(inputs, finished, tmp_path):
    whole = tmp_path / "store" / "artifacts" / "rl" / finished.key
    whole.parent.mkdir(parents=True)
    whole.symlink_to(finished.work / "out")
    run = make_run(inputs, tmp_path / "run", init=f"{finished.key}@6")
    run.key, run.launch["profile"] = "fedcba9876543210", True

    assert run.inside()["steps"] == 8

    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(finished).items())
    assert (run.work / "out" / "profile").is_dir()


def test_clipped_updates_with_divergence_run(inputs, tmp_path):
    changes = {"clip": 0.2, "updates": 2, "kl": 0.05, "divide_by_std": True, "steps": 2, "eval_tasks": []}
    run = make_run(inputs, tmp_path, **changes)

    run.inside(deterministic=False)

    assert all(kl >= 0 for _, kl in run.metrics("kl"))


def test_a_problem_that_comes_twice_in_a_step_is_answered_anew(inputs, tmp_path):
    run = make_run(inputs, tmp_path, tasks=[{"task": VOWELS, "size": 1}], problems=2, samples=2, steps=1, keep=4)

    run.inside()

    lines = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert len({line["completion"] for line in lines if not line.get("held_out")}) > 2


def test_nothing_to_train_on_is_refused(inputs, tmp_path):
    with pytest.raises(DataMistake, match="nothing to train on"):
        make_run(inputs, tmp_path, tasks=[]).inside(deterministic=False)


ONE = {"size": 1, "name": "one"}
SHORT = {"eval_tasks": [], "problems": 2, "samples": 2, "steps": 1}


def test_programs_that_a_check_judges_are_trained_on(inputs, tmp_path):
    run = make_run(inputs, tmp_path, tasks=[{"task": "tests.toys.vowels.Judged", **ONE}], **SHORT)

    run.inside(sandbox="weak")

    assert run.metrics("reward")


def test_programs_that_cannot_be_confined_end_rl_before_it_trains_unless_their_tasks_are_skipped(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(Sandbox, "weakness", "a program could read files")
    tasks = [{"task": VOWELS, **ONE}, {"task": "tests.toys.vowels.Judged", "size": 1}]
    run = make_run(inputs, tmp_path, tasks=tasks, **SHORT)

    with pytest.raises(UserError, match="for Judged cannot be confined: a program could read files"):
        run.inside(deterministic=False)
    assert not (tmp_path / "metrics.jsonl").exists()
    make_run(inputs, tmp_path / "skip", tasks=tasks, programs="skip", **SHORT).inside(deterministic=False)

    assert "Judged is left out, because rl.params.programs=skip" in (tmp_path / "skip" / "said.txt").read_text()
    with pytest.raises(DataMistake, match="no task to train on: programs=skip leaves out Judged"):
        rl.check(rl.Params(tasks=[TaskSpec(**tasks[1])], programs="skip"), {})


def test_a_task_whose_programs_judge_themselves_is_left_out_unless_it_is_asked_for(inputs, tmp_path):
    advisory = {"task": "tests.toys.vowels.Advisory", **ONE, "name": "own word"}
    tasks = [{"task": VOWELS, **ONE}, advisory]
    without = make_run(inputs, tmp_path / "without", tasks=tasks, **SHORT)
    asked = make_run(inputs, tmp_path / "asked", tasks=[advisory], advisory=True, **SHORT)

    without.inside()

    assert "own word is left out: its programs report their own verdicts" in without.said()
    assert {line["task"] for line in kept_answers(without, held_out=False)} == {"one"}
    assert asked.inside(sandbox="weak")["steps"] == 1
    with pytest.raises(DataMistake, match="no task to train on: programs of own word report their own verdicts"):
        rl.check(rl.Params(tasks=[TaskSpec(**advisory)]), {})


def test_a_verdict_that_is_advisory_without_being_declared_so_is_refused(inputs, tmp_path):
    with pytest.raises(UserError, match="task one runs programs that report their own verdicts"):
        tasks = [{"task": "tests.toys.vowels.Undeclared", **ONE}]
        make_run(inputs, tmp_path, tasks=tasks, **SHORT).inside(deterministic=False, sandbox="weak")


def test_multiple_choice_cannot_be_trained_on(inputs, tmp_path, shared_hub):
    inputs = inputs | {"dataset/arc": str(shared_hub / "datasets" / "allenai" / "ai2_arc")}
    with pytest.raises(DataMistake, match="multiple choice"):
        make_run(inputs, tmp_path, tasks=[{"task": "data.tasks.arc.ARC", "dataset": "arc"}]).inside(deterministic=False)
