"""eval: any model, by name or by folder, measured as the stages evaluate_* measure it; nothing is stored."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.tasks.mixture import CoreSpec
from pipeline.artifacts.store import Store
from pipeline.commands.cli import main
from pipeline.commands.evaluate import Subject, declared, params, split
from pipeline.commands.export import write
from pipeline.config import compose as config
from pipeline.config.settings import IdentityConfig, MixtureConfig, StageConfig
from pipeline.errors import UserError
from tests.pipeline.small_store import model_of, seal, session_of, small_store

SUMS = {"task": "data.tasks.arithmetic.Arithmetic", "name": "Sums", "split": "test", "size": 1000}
WORDS = {"task": "data.tasks.simple_spelling.SimpleSpelling", "dataset": "words", "split": "test"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return small_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def here(store, monkeypatch, tmp_path) -> Store:
    """The store, for commands in this process; temporary folders lie in tmp_path/tmp."""
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return store


def settings(**more) -> SimpleNamespace:
    """As much of Settings as params reads: a recipe with two evaluations."""
    mixture = MixtureConfig([], [], [], [], [SUMS, WORDS], IdentityConfig("Mill"), core=CoreSpec())
    base = {"tasks": [], "bpb_tokens": 512, "core": {"dataset": "core"}, "prompts": ["The"], "max_new_tokens": 8}
    chat = base | {"tasks": [SUMS], "core": None, "prompts": [], "questions": ["Who?"], "max_new_tokens": 16}
    stages = {
        "evaluate_base": StageConfig("pipeline.stages.evaluate", {"model": "pretrain"}, base),
        "evaluate_sft": StageConfig("pipeline.stages.evaluate", {"model": "sft"}, chat),
    }
    return SimpleNamespace(mixture=mixture, stages=stages, **more)


def test_a_model_by_name_and_its_exported_folder_have_the_same_results(chatmill, store, tmp_path):
    chatmill.store = store.root
    write(model_of(store, "sft"), tmp_path / "exported")
    settings = ("tasks=[Arithmetic,bpb]", "max_per_task=30", "max_new_tokens=8", "bpb_tokens=512")

    said = chatmill.run("eval", "sft", *settings, "--out", str(tmp_path / "sft.json"))
    chatmill.run("eval", str(tmp_path / "exported"), *settings, "--out", str(tmp_path / "exported.json"))

    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sft", "exported"))
    result = one["chat"]["Arithmetic"]
    assert result["items"] == 30 and one["bpb"]["val"] > 1 and one["samples"] == []
    low, high = result["ci"]
    assert f"Arithmetic {result['accuracy']:.1%} (0 of 30, 95% interval {low:.1%} to {high:.1%})" in said
    assert one["conversations"] == other["conversations"] and one["bpb"] == other["bpb"]
    assert (one["model"], other["model"]) == (model_of(store, "sft").label, str(tmp_path / "exported"))
    assert not list(store.artifacts.glob("evaluate/*"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ([], "eval: needs MODEL"),
        (["nobody"], "called 'nobody'"),
        ([str(Path(__file__).parent)], "holds no model: neither artifact.json"),
        (["sft", "tasks=[Sums]"], "there is no task 'Sums'. There are: Arithmetic, Remainders,"),
        (["sft", "tasks=[data.tasks.arc.ARX]"], "data.tasks.arc has no task of that name"),
        (["sft", "tasks=[[Arithmetic]]"], "there is no task ['Arithmetic']"),
        (["sft", "tasks=[Arithmetic]", "max_per_task=0"], "max_per_task: is 0. It must be at least 1"),
        (["sft", "tasks=[Arithmetic]", "max_per_task=few"], "max_per_task: is 'few'"),
        (["sft", "tasks=[bpb"], "Lists are written tasks=[ARC-Easy,core]"),
        (["sft", "samples=many"], "eval.params.samples: is 'many'"),
        (["sft", "tasks=[Arithmetic]", "samples=4"], "at temperature 0 all of them are the same"),
        (["sft", "sampels=2"], "there is no setting sampels"),
        (["sft", "--out", "/nowhere/at/all.json"], "is in a folder that does not exist"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(here, tmp_path, capsys, line, complaint):
    assert main(["eval", *line]) == 2

    assert complaint in capsys.readouterr().err
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("left", [None, 20])
def test_what_is_damaged_in_an_exported_folder_is_named(here, tmp_path, capsys, damaged, left):
    write(model_of(here, "sft"), tmp_path / "exported")
    path = tmp_path / "exported" / damaged
    path.write_bytes(path.read_bytes()[:left]) if left else path.unlink()

    assert main(["eval", str(tmp_path / "exported"), "tasks=[Arithmetic]"]) != 0
    told = capsys.readouterr().err
    assert str(tmp_path / "exported") in told and told.count("\n") == 1
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_tasks_the_recipes_own_evaluation_of_such_a_model_is_done():
    assert params(settings(), ["sft"], {}) == settings().stages["evaluate_sft"].params
    assert params(settings(), ["pretrain"], {})["core"] == {"dataset": "core"}


def test_with_tasks_only_these_are_measured_with_the_recipes_other_settings():
    found = params(settings(), ["sft"], {"tasks": ["Sums", "core"], "max_per_task": 16, "temperature": 0.5})

    assert found["tasks"] == [SUMS | {"size": 16}] and found["core"] == {"dataset": "core", "max_per_task": 16}
    assert (found["bpb_tokens"], found["prompts"], found["questions"]) == (None, [], [])
    assert (found["max_new_tokens"], found["temperature"]) == (16, 0.5)
    assert params(settings(), ["sft"], {"tasks": "bpb"})["bpb_tokens"] == 512


def test_a_task_is_a_name_of_the_mixture_an_import_path_or_an_entry_of_its_own():
    entry = {"task": "my.Task", "size": 5}

    found = params(settings(), ["sft"], {"tasks": ["SimpleSpelling", "my.Other", entry]})

    assert found["tasks"] == [WORDS, {"task": "my.Other", "split": "test"}, {"split": "test", **entry}]


def test_overrides_of_the_evaluation_are_told_from_those_of_the_recipe():
    own, rest = split(["recipe=d12", "tasks=[ARC-Easy,{task: my.Task, size: 5}]", "samples=4", "launch.device=cpu"])

    assert own == {"tasks": ["ARC-Easy", {"task": "my.Task", "size": 5}], "samples": 4}
    assert rest == ["recipe=d12", "launch.device=cpu"]


def test_the_data_sets_of_the_tasks_are_found_out():
    real = config.settings(config.compose(["mixture=nanochat"]))

    stage, datasets = declared(real, params(real, ["sft"], {"tasks": ["GSM8K", "core"]}))

    assert [spec.label for spec in stage.params.tasks] == ["GSM8K"]
    assert sorted(datasets.stages) == ["dataset/core", "dataset/gsm8k"]


def subject(store, name):
    return Subject.find(session_of(store), [], str(name))


def test_bits_per_byte_are_of_the_text_that_the_model_comes_from(store, tmp_path):
    tokens = store.find_by_name("tokenize").folder
    write(model_of(store, "sft"), tmp_path / "exported")

    assert subject(store, "sft").tokens() == tokens
    assert subject(store, tmp_path / "exported").tokens() == tokens
    assert subject(Store(tmp_path / "other"), model_of(store, "sft").folder).tokens() == tokens


def test_an_export_whose_store_is_gone_has_no_bits_per_byte_and_says_so(store, tmp_path):
    write(model_of(store, "sft"), tmp_path / "exported")

    with pytest.raises(UserError, match="bits per byte need the tokens"):
        subject(Store(tmp_path / "other"), tmp_path / "exported").tokens()


def test_a_run_whose_evaluation_is_cached_prints_its_scores(store, monkeypatch, capsys):
    monkeypatch.setenv("CHATMILL_STORE", str(store.root))
    step = session_of(store).plan(online=False, targets=["evaluate_sft"]).steps["evaluate_sft"]
    folder = store.folder("evaluate", step.key)
    folder.mkdir(parents=True)
    chat = {"Sums": {"accuracy": 0.5, "correct": 2, "items": 4, "ci": [0.15, 0.85]}}
    results = {"bpb": {"val": 1.25}, "core": None, "chat": chat, "chatcore": 0.5, "chatcore_tasks": 1, "left_out": []}
    (folder / "results.json").write_text(json.dumps(results))
    record = {"module": "evaluate", "key": step.key, "stages": ["evaluate_sft"], "finished": 1.0, "files": {}}
    (folder / "artifact.json").write_text(json.dumps(record))
    seal(folder)

    assert main(["until=evaluate_sft"]) == 0

    told = capsys.readouterr().out
    assert "Nothing to do" in told and "evaluate_sft  bpb 1.2500" in told
    assert "evaluate_sft  Sums 50.0% (2 of 4, 95% interval 15.0% to 85.0%)" in told
