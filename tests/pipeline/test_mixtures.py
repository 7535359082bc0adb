"""Every mixture that comes with the project names tasks that are there and data sets that are declared."""

import pytest

from data.sources.python_words import python_words
from data.tasks.mixture import TaskSpec, load_task
from pipeline import typed
from pipeline.config import compose as config

USES = ("midtrain", "sft", "rl", "rl_eval", "chat_eval")


def composed(mixture, *overrides):
    settings = config.compose([f"mixture={mixture}", *overrides])
    return settings["mixture"], settings["datasets"]


def specs(lines):
    return [typed.build(TaskSpec, line) for line in lines]


@pytest.mark.parametrize("mixture", ["tiny", "hub", "nanochat"])
def test_what_a_mixture_names_is_there(mixture):
    lists, datasets = composed(mixture)
    for use in USES:
        for spec in specs(lists[use]):
            assert spec.dataset is None or spec.dataset in datasets
            assert spec.split == "train" or use in ("rl_eval", "chat_eval")
        assert lists[use]
    names = [spec.label for spec in specs(lists["chat_eval"])]
    assert len(set(names)) == len(names)


def test_nanochats_proportions():
    lists, _ = composed("nanochat")
    sizes = {use: {spec.label: spec.size for spec in specs(lists[use])} for use in ("midtrain", "sft")}
    assert sizes["midtrain"] == {
        "SmolTalk": 460_000,
        "MMLU": 100_000,
        "GSM8K": None,
        "Identity": 1000,
        "SimpleSpelling": 200_000,
        "SpellingBee": 80_000,
    }
    assert sizes["sft"]["SmolTalk"] == 10_000
    assert next(spec for spec in specs(lists["midtrain"]) if spec.label == "Identity").repeat == 2


def test_tiny_needs_nothing_but_python(tmp_path):
    lists, datasets = composed("tiny")
    (tmp_path / "words.txt").write_text("\n".join(python_words()))
    for use in USES:
        for spec in specs(lists[use]):
            assert spec.dataset is None or datasets[spec.dataset]["source"] == "data.sources.python_words"
            task = load_task(spec, tmp_path if spec.dataset else None)
            assert task.conversation(len(task) - 1)["messages"]
            if use in ("rl", "rl_eval", "chat_eval"):
                assert task.grade(0, "") == 0.0


@pytest.mark.parametrize("mixture", ["tiny", "hub", "nanochat"])
def test_a_personality_is_one_setting_in_every_mixture(mixture):
    lists, _ = composed(mixture, "mixture.identity.file=marvin.jsonl", "mixture.identity.name=Marvin")
    for use in ("midtrain", "sft"):
        assert [spec.file for spec in specs(lists[use]) if spec.label == "Identity"] == ["marvin.jsonl"]
    graded = [spec.args["name"] for spec in specs(lists["chat_eval"]) if spec.label == "Identity"]
    assert graded == ["Marvin"]
