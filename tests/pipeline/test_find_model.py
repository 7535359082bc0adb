"""Which model a command means: what its configuration plans, the newest of a finished pipeline, or a folder."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from data.tokens import bpe
from model.saved import load_model
from pipeline.artifacts.store import Artifact, Store
from pipeline.commands.cli import main
from pipeline.commands.export import write
from pipeline.commands.find_model import default_model, find_model, in_folder
from pipeline.errors import UserError
from tests.pipeline.small_store import model_of, put_model, seal, session_of, small_store


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


@pytest.fixture
def exported(store, tmp_path):
    write(model_of(store, "sft"), tmp_path / "exported")
    return tmp_path / "exported"


def stand_in(store, stage, *overrides):
    """Make the stage's model under the key that a configuration plans for it."""
    step = session_of(store, *overrides).plan(online=False, targets=[stage]).steps[stage]
    assert step.key is not None
    module = {"pretrain": "pretrain", "rl": "rl"}.get(stage, "finetune")
    made = put_model(store, module, step.key, {})
    record = json.loads((made.folder / "artifact.json").read_text())
    (made.folder / "artifact.json").write_text(json.dumps(record | {"key": step.key, "stages": [stage]}))
    folder = store.folder(module, step.key)
    shutil.rmtree(folder, ignore_errors=True)
    made.folder.rename(folder)
    return Store.read(folder)


def note_run(store, number, artifacts, **state):
    """A run as it leaves its state; artifacts: by stage."""
    folder = store.root / "runs" / f"20261122-18400{number}-ab12"
    folder.mkdir(parents=True)
    made = {stage: {"module": artifact.module, "key": artifact.key} for stage, artifact in artifacts.items()}
    content = {"ended": time.time(), "failures": [], "overrides": [], "artifacts": made, "sweep": None} | state
    (folder / "state.json").write_text(json.dumps(content))
    rows = [{"stage": stage, "action": "run"} for stage in artifacts]
    (folder / "plan.json").write_text(json.dumps([*rows, {"stage": "download", "action": "idle"}]))


def renamed(store, name, stage):
    """Another model of a stage, newer than those before."""
    made = put_model(store, "finetune", name, {})
    record = json.loads((made.folder / "artifact.json").read_text())
    (made.folder / "artifact.json").write_text(json.dumps(record | {"stages": [stage], "finished": time.time() + 60}))
    return Store.read(made.folder)


# --- stages


def test_without_overrides_a_stage_is_the_newest(store):
    newer = renamed(store, "newer", "sft")

    found, why = find_model(session_of(store), [], "sft")

    assert found.key == newer.key and why == "the newest: no pipeline has finished"


@pytest.mark.parametrize(
    "state",
    [
        {"sweep": "20261122-190000-cd34"},
        {"failures": ["sft failed"]},
        {"ended": None},
        {"overrides": ["until=sft"]},
        {"overrides": ["only=[sft]"]},
    ],
)
def test_a_finished_pipeline_goes_before_what_tried_something_out(store, state):
    finished, newer = store.find_by_name("sft"), renamed(store, "newer", "sft")
    note_run(store, 1, {"sft": finished})
    note_run(store, 2, {"sft": newer}, **state)

    for found, why in (find_model(session_of(store), [], "sft"), default_model(session_of(store), [])):
        assert found.key == finished.key and why == "from the newest finished pipeline, run 20261122-184001-ab12"


def test_a_damaged_or_strange_record_of_a_run_is_passed_over(store):
    note_run(store, 1, {"sft": store.find_by_name("sft")})
    for number, content in enumerate(["", "[]", '{"ended": 1, "artifacts": {"sft": {}}}', "{"], 2):
        note_run(store, number, {"sft": store.find_by_name("sft")})
        (store.root / "runs" / f"20261122-18400{number}-ab12" / "state.json").write_text(content)

    assert find_model(session_of(store), [], "sft")[1] == "from the newest finished pipeline, run 20261122-184001-ab12"


def test_overrides_choose_what_they_plan_and_settings_of_a_machine_choose_nothing(store):
    planned = stand_in(store, "pretrain", "pretrain.params.steps=7")
    renamed(store, "newer", "pretrain")

    for more in ([], ["launch.device=cpu", "app.port=7861"]):
        given = ["pretrain.params.steps=7", *more]
        found, why = find_model(session_of(store, *given), given, "pretrain")
        assert found.key == planned.key and why == "as planned by pretrain.params.steps=7"
    given = ["launch.device=cpu", "run.name=x", "store.reverify_days=1", "sft.launch.threads=1"]
    assert find_model(session_of(store, *given), given, "sft")[1] == "the newest: no pipeline has finished"


def test_what_was_planned_and_never_made_says_what_makes_it_and_what_there_is(store):
    given = ["pretrain.params.steps=7"]

    with pytest.raises(UserError) as error:
        find_model(session_of(store, *given), given, "sft")

    told = str(error.value)
    assert "the store has no sft of this configuration" in told and "\n" not in told
    assert "`python flows.py pretrain.params.steps=7 until=sft`" in told
    assert f"To use sft {store.find_by_name('sft').key}" in told


def test_without_a_name_the_last_model_of_the_configuration_that_chats_is_taken(store):
    sft = stand_in(store, "sft", "pretrain.params.steps=7")
    stand_in(store, "pretrain", "pretrain.params.steps=7")
    given = ["pretrain.params.steps=7"]

    assert default_model(session_of(store, *given), given)[0].key == sft.key
    rl = stand_in(store, "rl", "pretrain.params.steps=7")
    assert default_model(session_of(store, *given), given)[0].key == rl.key


def test_keys_and_runs_are_names_whatever_the_overrides(store):
    given, key = ["pretrain.params.steps=7"], store.find_by_name("sft").key

    for name in (key, key[:12], f"finetune/{key}"):
        assert find_model(session_of(store, *given), given, name)[0].key == key
    with pytest.raises(UserError, match="called 'nobody'"):
        find_model(session_of(store), [], "nobody")


def test_an_empty_store_says_so(tmp_path):
    with pytest.raises(UserError, match="has no sft yet"):
        find_model(session_of(Store(tmp_path)), [], "sft")
    with pytest.raises(UserError, match="has no model yet"):
        default_model(session_of(Store(tmp_path)), [])


@pytest.mark.parametrize("verb", ["chat", "eval", "export"])
def test_each_command_prints_which_model_it_took_and_why(store, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    more = {
        "chat": ["--prompt", "Hi"],
        "eval": ["tasks=[Arithmetic]", "max_per_task=1"],
        "export": [str(tmp_path / "x")],
    }

    assert main([verb, "sft", *more[verb]]) == 0

    told = capsys.readouterr()
    label = model_of(store, "sft").label
    assert f"Model: {label}, the newest: no pipeline has finished" in told.out + told.err


# --- folders


def test_an_artifacts_folder_is_taken_by_its_own_store_and_nothing_else_is_a_model(store, tmp_path):
    folder = store.find_by_name("sft").folder

    found, why = find_model(session_of(Store(tmp_path / "other")), [], str(folder))

    assert found.folder == folder and found.store.root == store.root and why == "from this folder"
    with pytest.raises(UserError, match="is a tokenizer, not a model"):
        find_model(session_of(store), [], str(store.find_by_name("tokenizer").folder))
    with pytest.raises(UserError, match=r"holds no model: neither artifact\.json"):
        find_model(session_of(store), [], str(tmp_path))


@pytest.mark.parametrize("format", ["hf", "nanochat"])
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_chat_takes_what_export_wrote(store, tmp_path, monkeypatch, capsys, format, stage):
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    said = []
    write(model_of(store, stage), tmp_path / "exported", format)

    for name in (model_of(store, stage).key, str(tmp_path / "exported")):
        assert main(["chat", name, "--prompt", "Who?", "--temperature", "0", "--max-tokens", "12"]) == 0
        said.append(capsys.readouterr().out)

    assert said[0] == said[1] and said[0].strip()


def test_weights_and_tokenizer_of_different_vocabularies_are_one_line(exported, store):
    bpe.save(bpe.train(["the mill grinds the meal of the miller"] * 20, 275), exported)

    with pytest.raises(UserError, match="holds a tokenizer of 275 tokens and a model of 400"):
        in_folder(store, exported)


def with_code(folder):
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | {"arch": "stolen.Mine"}))


@pytest.mark.parametrize("verb", ["chat", "eval", "export"])
def test_a_folder_from_elsewhere_runs_no_code_of_its_own(store, tmp_path, monkeypatch, capsys, verb):
    other = small_store(tmp_path / "other")
    folder = other.find_by_name("sft").folder
    with_code(folder)
    seal(folder)
    (tmp_path / "stolen.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom model.gpt import GPT as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    line = {"chat": ["--prompt", "Hi"], "eval": ["tasks=[Arithmetic]"], "export": [str(tmp_path / "out")]}[verb]

    assert main([verb, str(folder), *line]) == 2

    assert "names stolen.Mine as its architecture" in (told := capsys.readouterr().err) and "--trust-code" in told
    assert not (tmp_path / "ran").exists()
    if verb == "chat":
        assert main([verb, str(folder), *line, "--trust-code"]) == 0 and (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "~nobody-of-this-name"])
def test_the_home_of_nobody_is_an_unknown_name(store, name):
    with pytest.raises(UserError, match="called '~nobody"):
        find_model(session_of(store), [], name)


def test_an_artifact_that_is_not_in_its_place_is_from_elsewhere(store):
    folder = store.root / "fetched" / "by" / "hand"
    shutil.copytree(store.find_by_name("sft").folder, folder)
    with_code(folder)
    seal(folder)

    with pytest.raises(UserError, match=r"names stolen\.Mine"):
        in_folder(store, folder)


def test_an_artifact_near_the_root_of_the_file_system_is_one_line(store, monkeypatch):
    found = Artifact(Path("/model"), store.find_by_name("sft").record)
    monkeypatch.setattr(Store, "read", staticmethod(lambda folder: found))

    with pytest.raises(UserError, match="is not a model"):
        in_folder(store, found.folder)


def test_a_store_trusts_its_own_architectures(store):
    folder = store.find_by_name("sft").folder
    with_code(folder)
    seal(folder)

    assert in_folder(store, folder).folder == folder


# --- what others fine-tune


@pytest.fixture
def tuned(exported, tmp_path):
    """A function: the export with one weight changed, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

    def save(folder, dtype="float32", **how):
        model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight[7] += 1.0
        model.save_pretrained(folder, **how)
        transformers.AutoTokenizer.from_pretrained(exported).save_pretrained(folder)
        return model

    return save


BFLOAT16 = pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.full)


@pytest.mark.parametrize("how", [{"max_shard_size": "30KB"}, BFLOAT16], ids=str)
def test_what_save_pretrained_wrote_is_a_model_here(store, tmp_path, tuned, how, monkeypatch, capsys):
    theirs = tuned(tmp_path / "tuned", **how)
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    tokens = torch.arange(48).view(1, 48)

    ours = load_model(in_folder(store, tmp_path / "tuned").folder)

    assert ((tmp_path / "tuned" / "model.safetensors.index.json").exists()) == ("max_shard_size" in how)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.float()(tokens).logits, rtol=0, atol=1e-4)
        assert not torch.equal(ours(tokens), load_model(model_of(store, "sft").folder)(tokens))
    assert main(["chat", str(tmp_path / "tuned"), "--prompt", "Hi", "--max-tokens", "4"]) == 0
    assert main(["export", str(tmp_path / "tuned"), str(tmp_path / "again")]) == 0
    assert main(["eval", str(tmp_path / "tuned"), "tasks=[Arithmetic]", "max_per_task=2"]) == 0
    again = load_model(tmp_path / "again")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), ours.parameters()))


def test_without_tasks_the_text_that_a_folder_from_elsewhere_was_trained_on_is_not_needed(
    store, tmp_path, tuned, monkeypatch, capsys
):
    tuned(tmp_path / "tuned")
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))

    line = ["max_per_task=1", "max_new_tokens=2", "sample_tokens=2"]
    assert main(["eval", str(tmp_path / "tuned"), *line]) == 0

    assert "Bits per byte are left out" in capsys.readouterr().err
