"""lm-evaluation-harness on an exported model agrees with our CORE tasks, item by item, where prompts are the same.

Zero-shot, <|bos|> in front (add_bos_token), an option's score divided by its tokens: what docs/evaluation.md tells.
"""

import dataclasses
import json
import zipfile

import pytest
import torch

from data.tokens.tokenizer import Tokenizer
from evals.core import score
from evals.core_prompts import TaskItems, encode, read_bundle
from model.decoding.engine import Engine
from model.decoding.sampling import Sampling
from model.saved import load_model
from pipeline.commands.export import write
from tests.pipeline.small_store import model_of, put_model, small_store

ITEMS = 30
TEMPLATES = {
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    },
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that was never trained, and its exported folder."""
    store = small_store(tmp_path_factory.mktemp("store"))
    put_model(store, "pretrain", "long", {}, sequence_len=1024)
    found, folder = model_of(store, "long"), tmp_path_factory.mktemp("exported") / "long"
    write(found, folder)
    return load_model(found.folder), Tokenizer.load(found.tokenizer), folder


@pytest.fixture(scope="module")
def harness(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        for name in ("lm_eval", "accelerate"):
            pytest.importorskip(name, reason="needs lm-eval: pip install -e '.[compare]'")
        from lm_eval.models.huggingface import HFLM

        yield HFLM(pretrained=str(model[2]), add_bos_token=True, device="cpu", dtype="float32", batch_size=16)


@pytest.fixture(scope="module")
def bundle(shared_hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    zipfile.ZipFile(shared_hub / "files" / "eval_bundle.zip").extractall(folder)
    return folder


@pytest.mark.parametrize("label", ["arc_easy", pytest.param("lambada_openai", marks=pytest.mark.full)])
def test_the_harness_agrees_item_by_item(bundle, model, harness, tmp_path, label):
    network, tokenizer, _ = model
    task = next(task for task in read_bundle(bundle) if task.label == label)
    items = TaskItems.load(dataclasses.replace(task, shots=0), ITEMS)
    questions = encode(items, range(ITEMS), tokenizer, network.config.sequence_len)
    exact = label == "lambada_openai"

    right = score(network, questions, exact, batch_tokens=8192)
    samples = measure(harness, label, items, tmp_path)

    agreed = 0
    for question, sample, ours in zip(questions, samples, right):
        expected = [log_likelihood(network, option) for option in question.options]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        if not exact:  # CORE leaves out what all options begin with, which adds the same to each of theirs
            theirs = [total - theirs[0] + expected[0] for total in theirs]
        assert theirs == pytest.approx(expected, abs=1e-3)
        means = [total / (option.end - option.start) for total, option in zip(theirs, question.options)]
        verdict = sample["acc"] == 1.0 if exact else means.index(max(means)) == question.gold
        agreed += verdict == ours
    assert agreed >= ITEMS - 1 and not any(question.cropped for question in questions)


@pytest.mark.parametrize("length", [5, 100])
def test_an_answer_is_as_long_as_the_harness_asks(model, harness, length):
    from lm_eval.api.instance import Instance

    network, tokenizer, _ = model
    engine = Engine(network, tokenizer.special, tokenizer.decode_bytes, tokenizer.encode, tools=None)
    text = "The mill grinds"
    wanted = {"until": ["no such text"], "max_gen_toks": length, "do_sample": False}

    (expected,) = engine.generate(
        [[tokenizer.bos, *tokenizer.encode(text)]], Sampling(temperature=0.0, max_tokens=length)
    )
    (found,) = harness.generate_until([Instance("generate_until", {}, (text, wanted), 0)], disable_tqdm=True)

    assert len(expected.tokens) == length
    special = set(tokenizer.special.values())
    assert found == tokenizer.decode([token for token in expected.tokens if token not in special])


def measure(harness, label, items, folder):
    """The harness's samples of the bundle's own items, in order."""
    import lm_eval

    pool = items.pool[: items.count]
    docs = pool if label == "arc_easy" else [{"text": f"{d['context'].strip()} {d['continuation']}"} for d in pool]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    described = {"task": label, **source, "test_split": "test", **TEMPLATES[label], "metric_list": [metric]}
    found = lm_eval.simple_evaluate(model=harness, tasks=[described], log_samples=True, bootstrap_iters=0)
    return sorted(found["samples"][label], key=lambda sample: sample["doc_id"])


@torch.no_grad()
def log_likelihood(network, option) -> float:
    scores = network(torch.tensor([option.ids]))[0].log_softmax(-1)
    return float(sum(scores[at - 1, option.ids[at]] for at in range(option.start, option.end)))
