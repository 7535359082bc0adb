"""pretrain, midtrain and sft as stages: what they make, and what they say when it cannot be made."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from trained import LENGTH, TINY_MODEL, VOCAB, StageRun, write_inputs

from model.config import TrainConfig
from model.errors import Diverged, ModelError
from model.saved import load_model
from model.training.checkpoint import steps_in
from pipeline.job import Stopped
from pipeline.stages import finetune as finetune_stage
from pipeline.stages import pretrain as pretrain_stage

PRETRAIN = ("tokens", "pack", "tokenizer")
PARAMS = {"model": TINY_MODEL, "total_batch_tokens": 512, "steps": 12, "eval_every": 6, "val_tokens": 512}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def pretrain(tmp_path: Path, inputs):
    """A pretrain in a folder of its own, by name, with the settings given."""

    def make(name: str = "run", launch: dict | None = None, **params) -> StageRun:
        chosen = {k: inputs[k] for k in PRETRAIN}
        return StageRun("pretrain", tmp_path / name, chosen, PARAMS | params, {"log_every": 3} | (launch or {}))

    return make


@pytest.fixture(scope="module")
def base(tmp_path_factory, inputs) -> StageRun:
    """A pretrained model, to be tuned."""
    made = {k: inputs[k] for k in PRETRAIN}
    run = StageRun("pretrain", tmp_path_factory.mktemp("base"), made, PARAMS | {"steps": 60}, {"save_every": 20})
    run.inside()
    return run


def finetune(base: StageRun, folder: Path, inputs, *names: str, **params) -> StageRun:
    chosen = {"model": str(base.work / "out")} | {k: inputs[k] for k in ("rows", "tokenizer", *names)}
    settings = {"total_batch_tokens": 256, "lr_frac": 0.1, "val_tokens": 512} | params
    return StageRun("finetune", folder / "tuned", chosen, settings, {"log_every": 1})


def test_a_base_model_learns_and_is_published_with_its_checkpoints(base):
    losses = base.metrics("loss")
    bpb = base.metrics("val_bpb")
    assert [step for step, _ in losses] == [10, 20, 30, 40, 50, 60] and losses[-1][1] < 0.9 * losses[0][1]
    assert [step for step, _ in bpb] == list(range(6, 61, 6)) and bpb[-1][1] < bpb[0][1]
    model = load_model(base.work / "out")
    assert model.config.vocab_size == VOCAB and model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, VOCAB)
    assert steps_in(base.work / "out" / "checkpoints") == [40, 60]
    logged = json.loads((base.work / "metrics.jsonl").read_text().splitlines()[-2])
    names = {"loss", "loss_smooth", "grad_norm", "tokens", "tok_s", "mfu", "memory_mb", "epoch"}
    assert names | {"lr/matrix", "lr/embedding", "lr/unembedding"} <= set(logged)
    assert logged["epoch"] == pytest.approx(logged["tokens"] / ((40_000 - 1) // LENGTH * LENGTH))


def test_metrics_of_the_artifact_say_what_was_made(pretrain):
    metrics = pretrain().inside()
    assert (metrics["steps"], metrics["tokens"], metrics["dtype"]) == (12, 12 * 512, "float32")
    assert metrics["params"] == 2 * VOCAB * 32 + 12 * 2 * 32**2 and metrics["val_bpb"] > 0 and metrics["tok_s"] > 0


@pytest.mark.parametrize(
    "launch",
    [{"device_batch_size": 4}, {"grad_checkpoint": True}, {"deterministic": True}, {"profile": True}],
    ids=lambda launch: next(iter(launch)),
)
def test_how_a_model_is_trained_does_not_change_what_it_becomes(pretrain, launch):
    plain, other = pretrain("plain"), pretrain("other", launch)
    plain.inside()
    try:
        other.inside()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, weight in plain.weights().items():
        assert torch.allclose(weight, other.weights()[name], atol=2e-4), name
    assert bool(list(other.work.glob("out/profile/trace-0.pt.trace.json"))) == bool(launch.get("profile"))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_sixteen_bit_dtypes_train_too_and_keep_float32_weights(pretrain, dtype):
    run = pretrain(dtype, {"log_every": 1}, dtype=dtype, steps=6, total_batch_tokens=256, val_tokens=128)
    assert run.inside()["dtype"] == dtype
    losses = [loss for _, loss in run.metrics("loss")]
    assert losses[-1] < 0.8 * losses[0] and run.weights()["lm_head.weight"].dtype == torch.float32


def test_eight_bits_and_dropped_spikes_are_asked_for_by_params(pretrain):
    run = pretrain("eight", {"log_every": 1}, fp8=True, skip_spikes=3.0, steps=6, val_tokens=128)
    assert run.inside()["dropped_steps"] == 0
    assert "in 8 bits (emulated" in (run.work / "said.txt").read_text()
    losses = [loss for _, loss in run.metrics("loss")]
    assert losses[-1] < 0.9 * losses[0]


def test_optimisers_are_chosen_by_name(pretrain):
    for number, optim in enumerate(
        [
            {"name": "adamw", "matrix_lr": 1e-3, "embedding_lr": 1e-2},
            {"name": "sgd", "matrix_lr": 0.1, "embedding_lr": 1.0, "unembedding_lr": 1.0},
            {"name": "torch.optim.RMSprop", "matrix_lr": 1e-3, "embedding_lr": 1e-3, "unembedding_lr": 1e-3},
        ]
    ):
        run = pretrain(str(number), optim=optim, steps=20)
        run.inside()
        losses = [loss for _, loss in run.metrics("loss")]
        assert losses[-1] < losses[0], optim


def test_sft_starts_from_its_model_and_trains_on_what_the_mask_says(base, inputs, tmp_path):
    run = finetune(base, tmp_path, inputs, epochs=2)
    metrics = run.inside()
    rows_per_step, trained_on = 256 // LENGTH, LENGTH // 2 + 1
    assert metrics["steps"] == 2 * 40 // rows_per_step and metrics["tokens"] == 2 * 40 * trained_on
    assert "val_bpb" not in metrics and metrics["empty_steps"] == 0
    before, after = base.weights(), run.weights()
    change = sum(float((after[n] - w).norm()) for n, w in before.items()) / sum(
        float(w.norm()) for w in before.values()
    )
    assert 1e-5 < change < 0.1


def test_midtrain_with_text_as_input_measures_bits_per_byte_before_it_ends(base, inputs, tmp_path):
    run = finetune(base, tmp_path, inputs, "tokens", steps=4, eval_every=2)
    assert run.inside()["val_bpb"] == run.metrics("val_bpb")[-1][1] and len(run.metrics("val_bpb")) == 2


def test_dropout_is_a_param_of_either(base, pretrain, inputs, tmp_path):
    dropping = pretrain("dropping", model=TINY_MODEL | {"dropout": 0.3})
    dropping.inside()
    plain = pretrain("plain")
    plain.inside()
    assert dropping.metrics("loss") != plain.metrics("loss")
    tuned = finetune(base, tmp_path, inputs, dropout=0.3)
    tuned.inside()
    assert json.loads((tuned.work / "out" / "model.json").read_text())["dropout"] == 0.3


def test_a_run_asked_to_stop_saves_and_goes_on_later_as_if_nothing_had_been(pretrain):
    straight = pretrain("straight")
    straight.inside()
    run = pretrain()
    run.work.mkdir()
    (run.work / "stop").touch()
    with pytest.raises(Stopped, match="step 0"):
        run.inside()
    (run.work / "stop").unlink()
    run.inside()
    assert run.metrics("loss") == straight.metrics("loss")


def test_a_run_goes_on_from_a_named_checkpoint_of_another(base, pretrain):
    longer = pretrain("longer", steps=70, init=f"{base.key}@40")
    unfinished = longer.work.parent / "store" / "work" / f"pretrain-{base.key}"
    unfinished.mkdir(parents=True)
    (unfinished / "out").symlink_to(base.work / "out")
    assert longer.inside()["steps"] == 70
    assert longer.metrics("loss")[0] == next(line for line in base.metrics("loss") if line[0] == 40)
    with pytest.raises(ModelError, match=r"steps of that key: 40, 60"):
        pretrain("wrong", init=f"{base.key}@41").inside()
    with pytest.raises(ModelError, match=r"@40 is not before the end, step 40"):
        pretrain("past", steps=40, init=f"{base.key}@40").inside()


def test_tuning_goes_on_from_a_named_checkpoint_too_and_says_so_when_it_diverges(base, inputs, tmp_path):
    whole = finetune(base, tmp_path / "whole", inputs, steps=12)
    whole.launch["save_every"] = 4
    whole.inside()
    unfinished = tmp_path / "store" / "work" / f"finetune-{whole.key}"
    unfinished.parent.mkdir(parents=True)
    unfinished.symlink_to(whole.work)
    again = finetune(base, tmp_path, inputs, steps=12, init=f"{whole.key}@8")
    again.inside()
    assert again.metrics("loss") == whole.metrics("loss")[7:]
    wrong = finetune(base, tmp_path / "wrong", inputs, steps=12, optim={"matrix_lr": 1e25}, grad_clip=None)
    wrong.launch["save_every"] = 1
    way_out = r"With half the rate: finetune\.params\.init=\w+@\d+ finetune\.params\.lr_frac=0\.05"
    with pytest.raises(Diverged, match=rf"at step \d+; the last good checkpoint is of step \d+\. {way_out}"):
        wrong.inside()


@pytest.mark.parametrize(
    "params, launch, said",
    [
        ({"total_batch_tokens": 500}, {}, r"not a multiple .* nearest that is: 512"),
        ({}, {"device_batch_size": 5}, r"device_batch_size=5 does not divide .* 1, 2, 4, 8, 16"),
        ({"steps": 100}, {}, r"51,200 tokens, but the packed text has 39,968 .*steps=78.*max_epochs=2"),
        ({"steps": None, "tokens": 100}, {}, "shorter than one step"),
        ({"tokens": 1000}, {}, "not both"),
        ({"model": TINY_MODEL | {"sequence_len": 16}}, {}, r"rows of 32 tokens, but model\.sequence_len is 16"),
        ({"model": TINY_MODEL | {"vocab_size": 99}}, {}, r"tokenizer has 67 tokens"),
        ({}, {"device": "cuda"}, r"launch\.device=cuda"),
        ({}, {"resume": 7}, r"no good checkpoint of step 7"),
    ],
)
def test_settings_that_do_not_fit_are_said_before_training_with_the_way_out(pretrain, params, launch, said):
    if launch.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what it should lack")
    run = pretrain(launch=launch, **params)
    with pytest.raises(ModelError, match=said):
        run.inside()
    assert not (run.work / "metrics.jsonl").exists()


def test_rows_longer_than_the_context_are_refused(base, inputs, tmp_path, pretrain):
    short = pretrain("short", model=TINY_MODEL)
    short.inside()
    described = json.loads((short.work / "out" / "model.json").read_text())
    (short.work / "out" / "model.json").write_text(json.dumps(described | {"sequence_len": 16}))
    with pytest.raises(ModelError, match="more than the model's context of 16"):
        finetune(short, tmp_path, inputs).inside()


@pytest.mark.parametrize(
    "save_every, said",
    [
        (None, r"there is no checkpoint yet\. With half the rate: pretrain\.params\.optim\.init_lr_frac=0\.5"),
        (1, r"checkpoint is of step (\d+)\. With half the rate: pretrain\.params\.init=0123456789abcdef@\1 pretrain"),
    ],
)
def test_a_run_that_diverges_names_step_last_good_checkpoint_and_way_out(pretrain, save_every, said):
    run = pretrain(optim={"matrix_lr": 1e38}, grad_clip=None, launch={"save_every": save_every})
    with pytest.raises(Diverged, match=rf"(?:loss|gradient norm) became (?:nan|inf) at step \d+; .*{said}"):
        run.inside()


def test_the_horizon_counts_what_the_base_architecture_would_have(inputs):
    from model.config import GPTConfig
    from pipeline.stages.pretrain import Params, count_steps

    base, modern = (GPTConfig(arch=arch, depth=20, vocab_size=65_536).resolved() for arch in ("base", "modern"))
    assert count_steps(Params(), base) == count_steps(Params(), modern) == 21_400


def test_settings_that_trainings_share_are_declared_once():
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    again = {stage.__name__: shared & set(stage.Params.__annotations__) for stage in (pretrain_stage, finetune_stage)}
    assert again == {"pipeline.stages.pretrain": set(), "pipeline.stages.finetune": {"eval_every"}}  # another default
    assert all(issubclass(stage.Params, TrainConfig) for stage in (pretrain_stage, finetune_stage))
