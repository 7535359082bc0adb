import json
from dataclasses import asdict

import pytest

from model.config import GPTConfig
from pipeline.artifacts.store import Store
from pipeline.errors import UserError
from pipeline.ui.models import PROMPTS, TEXTS, choice, find_models


def put(store, module, key, finished, stages=None, inputs=None, **files):
    folder = store.folder(module, key)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    record = {"module": module, "key": key, "stages": stages or [module], "inputs": inputs or {}, "finished": finished}
    (folder / "artifact.json").write_text(json.dumps(record | {"files": {}}))
    return store.read(folder)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    put(store, "tokenizer", "tttt1111", 1.0)
    return store


MODEL = asdict(GPTConfig(depth=2, width=128, vocab_size=512, sequence_len=256).resolved())
TOKENIZER = {"tokenizer": "tttt1111"}


def test_the_newest_chat_model_is_the_default_and_base_models_come_last(store):
    put(store, "finetune", "ffff1111", 3.0, ["sft"], TOKENIZER, model=MODEL)
    put(store, "rl", "rrrr1111", 4.0, ["rl"], TOKENIZER, model=MODEL)
    put(store, "pretrain", "pppp1111", 5.0, ["pretrain"], TOKENIZER, model=MODEL)

    found = find_models(store)

    assert [m.label for m in found] == ["rl · rrrr1111", "sft · ffff1111", "pretrain · pppp1111"]
    assert "2 layers · 256 tokens of context" in found[0].facts
    assert "base model" in found[2].facts and "base model" not in found[0].facts


def test_a_model_whose_tokenizer_is_gone_is_not_offered_and_says_so_when_named(store):
    artifact = put(store, "rl", "rrrr1111", 4.0, ["rl"], {"tokenizer": "gone"}, model=MODEL)

    assert find_models(store) == []
    with pytest.raises(UserError, match="rl/rrrr1111: its tokenizer"):
        choice(store, artifact)


def test_an_artifact_that_is_no_model_is_refused(store):
    with pytest.raises(UserError, match="tokenizer/tttt1111: is not a model"):
        choice(store, store.read(store.folder("tokenizer", "tttt1111")))


@pytest.mark.parametrize(
    "shape", [7, {}, [7], [{}], [{"correct": 1, "task": "GSM8K", "prompt": 7}], [{"prompt": [""]}]]
)
def test_results_of_another_shape_give_no_prompts(store, shape):
    artifact = put(store, "pretrain", "pppp1111", 4.0, ["pretrain"], TOKENIZER, model=MODEL)
    results = {"conversations": shape, "samples": shape}
    put(store, "evaluate", "eeee1111", 5.0, inputs={"model": "pppp1111"}, results=results)

    assert choice(store, artifact).prompts == TEXTS


def test_a_base_model_is_given_texts_to_continue(store):
    artifact = put(store, "pretrain", "pppp1111", 4.0, ["pretrain"], TOKENIZER, model=MODEL)
    samples = [{"prompt": "The mill is", "text": " old"}]
    put(store, "evaluate", "eeee1111", 6.0, ["evaluate_base"], {"model": "pppp1111"}, results={"samples": samples})

    assert choice(store, artifact).prompts == ("The mill is", *TEXTS[:3])


def test_what_the_model_answered_rightly_is_proposed_first(store):
    artifact = put(store, "rl", "rrrr1111", 4.0, ["rl"], TOKENIZER, model=MODEL)
    answers = [
        {"task": "Spelling", "prompt": "Spell mill.", "correct": 1.0},
        {"task": "Spelling", "prompt": "Spell wind.", "correct": 1.0},
        {"task": "Sums", "prompt": "2 + 2?", "correct": 0.0},
        {"task": "ARC", "prompt": "Multiple Choice question: ...\n- a=A", "correct": 1.0},
    ]
    put(store, "evaluate", "eeee1111", 6.0, ["evaluate_rl"], {"model": "rrrr1111"}, results={"conversations": answers})

    assert choice(store, artifact).prompts == ("Spell mill.", *PROMPTS[:3])
