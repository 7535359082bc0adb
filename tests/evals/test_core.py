"""CORE as DCLM defines it: prompts word by word, and batches that answer as one question at a time does."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from evals.core import Core, CoreSettings, plan, score, score_name
from evals.core_prompts import CoreTask, TaskItems, common_prefix, encode, read_bundle
from evals.ledger import Ledger
from evals.metrics import wilson
from model.config import GPTConfig
from model.gpt import GPT

SHARED_BUNDLE = Path(__file__).parents[2].parent / "shared/hub/files/eval_bundle.zip"


class Bytes:
    """A tokenizer with a token for each byte."""

    bos = 256

    def encode_batch(self, texts, threads):
        return [list(text.encode()) for text in texts]


def make_model(arch="base", sequence_len=512) -> GPT:
    config = GPTConfig(arch=arch, depth=2, width=32, head_dim=16, sequence_len=sequence_len).resolved(257)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


MC = [{"query": f"Question: {'x' * n} {n}?", "choices": [f"a{n}", "bb", f"c {n} c"], "gold": n % 3} for n in range(14)]
SCHEMA = [
    {
        "context_options": [f"The cat {n} because the cat", f"The cat {n} because a dog"],
        "continuation": "ran.",
        "gold": n % 2,
    }
    for n in range(9)
]
LM = [{"context": f" {n} and {n} is ", "continuation": f"{2 * n}"} for n in range(12)]


@pytest.fixture
def bundle(tmp_path) -> Path:
    root = tmp_path / "bundle" / "eval_bundle"
    (root / "eval_data").mkdir(parents=True)
    for name, items in (("mc", MC), ("schema", SCHEMA), ("lm", LM)):
        (root / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (root / "core.yaml").write_text("""
icl_tasks:
- label: mc
  dataset_uri: mc.jsonl
  num_fewshot: [3]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- {label: schema, dataset_uri: schema.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: lm, dataset_uri: lm.jsonl, num_fewshot: [2], icl_task_type: language_modeling}
""")
    (root / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmc,40\nschema,50\nlm,0\n")
    return tmp_path / "bundle"


def shuffled(items: list[dict]) -> list[dict]:
    items = list(items)
    random.Random(1337).shuffle(items)
    return items


def test_multiple_choice_prompts_word_by_word(bundle):
    items = TaskItems.load(read_bundle(bundle)[0])
    pool = shuffled(MC)
    others = [item for place, item in enumerate(pool) if place != 5]
    shown = random.Random(1234 + 5).sample(others, 3)

    before = "".join(f"{item['query']}\nAnswer: {item['choices'][item['gold']]}\n\n" for item in shown)
    assert items.prompts(5) == [f"{before}{pool[5]['query']}\nAnswer: {choice}" for choice in pool[5]["choices"]]


def test_schema_prompts_share_their_end(bundle):
    items = TaskItems.load(read_bundle(bundle)[1])
    item = shuffled(SCHEMA)[0]

    assert items.prompts(0) == [f"{context} ran." for context in item["context_options"]]
    options = encode(items, [0], Bytes(), 512)[0].options
    assert [bytes(o.ids[o.start : o.end]) for o in options] == [b" ran.", b" ran."]  # both contexts end alike here
    assert options[0].start != options[1].start


def test_language_modelling_prompts_are_trimmed(bundle):
    items = TaskItems.load(read_bundle(bundle)[2], max_per_task=5)
    pool = shuffled(LM)[:5]
    shown = random.Random(1234 + 2).sample([item for place, item in enumerate(pool) if place != 2], 2)

    before = "".join(f"{item['context'].strip()} {item['continuation']}\n\n" for item in shown)
    text = before + pool[2]["context"].strip()
    assert items.prompts(2) == [text, f"{text} {pool[2]['continuation']}"]
    option = encode(items, [2], Bytes(), 512)[0].options[0]
    assert bytes(option.ids[option.start : option.end]).decode() == f" {pool[2]['continuation']}"


def test_too_few_items_for_the_examples_take_more_from_the_task(bundle):
    items = TaskItems.load(read_bundle(bundle)[0], max_per_task=2)

    assert items.count == 2 and len(items.examples(1)) == 3


def test_texts_beyond_the_context_lose_their_beginning_and_are_counted(bundle):
    items = TaskItems.load(read_bundle(bundle)[0])
    question = encode(items, [0], Bytes(), 40)[0]

    assert question.cropped and all(len(option.ids) == 40 for option in question.options)
    whole = encode(items, [0], Bytes(), 4096)[0]
    assert not whole.cropped
    for cut, full in zip(question.options, whole.options):
        assert cut.ids[cut.start : cut.end] == full.ids[full.start : full.end]


def one_at_a_time(model: GPT, question, exact: bool) -> bool:
    losses = []
    with torch.inference_mode():
        for option in question.options:
            ids = torch.tensor([option.ids])
            logits = model(ids)[0, option.start - 1 : option.end - 1]
            targets = ids[0, option.start : option.end]
            if exact:
                return bool((logits.argmax(-1) == targets).all())
            losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
    return losses.index(min(losses)) == question.gold


@pytest.mark.parametrize("arch", ["base", "modern"])
@pytest.mark.parametrize(("context", "batch_tokens"), [(512, 100_000), (512, 300), (60, 1000)])
def test_batches_answer_as_one_question_at_a_time_does(bundle, arch, context, batch_tokens):
    model = make_model(arch, context)
    for task in read_bundle(bundle):
        items = TaskItems.load(task)
        questions = encode(items, range(items.count), Bytes(), context)
        exact = task.kind == "language_modeling"
        if exact:  # make some of them right
            for question in questions[::2]:
                option = question.options[0]
                with torch.inference_mode():
                    for place in range(option.start, option.end):
                        option.ids[place] = int(model(torch.tensor([option.ids]))[0, place - 1].argmax())

        expected = [one_at_a_time(model, question, exact) for question in questions]

        assert score(model, questions, exact, batch_tokens) == expected
        assert len(set(expected)) == 2


def run(model, bundle, folder, ranks=1, stop_after=None):
    """The result and how many chunks were measured for it."""
    core = Core(bundle, CoreSettings(batch_tokens=200))
    checks = 0

    def check():
        nonlocal checks
        checks += 1
        if stop_after is not None and checks > stop_after:
            raise KeyboardInterrupt

    for rank in range(ranks):
        core.measure(model, Bytes(), Ledger(folder, rank, ranks), check, lambda *a: None)
    return core.collect(Ledger(folder, 0, ranks), check), checks


def without_times(result):
    return {name: value for name, value in result.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_score_is_the_mean_centred_accuracy_and_does_not_depend_on_ranks(bundle, tmp_path, ranks):
    model = make_model()
    result, _ = run(model, bundle, tmp_path / "one")
    shared, _ = run(model, bundle, tmp_path / "shared", ranks)

    accuracy = result["accuracy"]
    centred = [(accuracy["mc"] - 0.4) / 0.6, (accuracy["schema"] - 0.5) / 0.5, accuracy["lm"]]
    assert math.isclose(result["score"], sum(centred) / 3)
    assert result["items"] == 14 + 9 + 12 and score_name(result) == "CORE-3/22"
    assert result["counts"] == {"mc": 14, "schema": 9, "lm": 12}
    assert result["baseline"] == {"mc": 0.4, "schema": 0.5, "lm": 0.0}
    assert result["ci"] == {label: list(wilson(accuracy[label], n)) for label, n in result["counts"].items()}
    assert set(result["seconds_by_task"]) == set(accuracy)
    assert without_times(shared) == without_times(result)


def test_what_ranks_have_measured_is_kept_for_another_number_of_them(bundle, tmp_path):
    model = make_model()
    whole, calls = run(model, bundle, tmp_path / "whole")
    core = Core(bundle, CoreSettings(batch_tokens=200))
    core.measure(model, Bytes(), Ledger(tmp_path / "parts", 2, 3), lambda: None, lambda *a: None)
    done = sum(len(items) for items in Ledger(tmp_path / "parts").records.values())

    resumed, more = run(model, bundle, tmp_path / "parts", ranks=2)

    assert without_times(resumed) == without_times(whole)
    assert 0 < done == calls - more


def test_a_stopped_evaluation_goes_on_where_it_was(bundle, tmp_path):
    model = make_model()
    whole, calls = run(model, bundle, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, bundle, tmp_path / "parts", stop_after=5)
    with open(tmp_path / "parts" / "ledger.0.jsonl", "a") as file:
        file.write('{"group": "core/mc", "ite')  # cut off by a crash

    resumed, more = run(model, bundle, tmp_path / "parts")

    assert without_times(resumed) == without_times(whole)
    assert more == calls - 5


def test_a_bundle_that_is_none_is_named(tmp_path, bundle):
    with pytest.raises(DataError, match="is not a CORE bundle"):
        read_bundle(tmp_path / "nothing")
    (bundle / "eval_bundle" / "eval_data" / "lm.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm\.jsonl"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "core.yaml",
            "icl_tasks: [{label: mc, dataset_uri: ../../../x, num_fewshot: [0], icl_task_type: schema}]",
            "Refused",
        ),
        (
            "core.yaml",
            "icl_tasks: [{label: mc, dataset_uri: /etc/passwd, num_fewshot: [0], icl_task_type: schema}]",
            "Refused",
        ),
        (
            "core.yaml",
            "icl_tasks: [{label: mc, dataset_uri: mc.jsonl, num_fewshot: [0], icl_task_type: x}]",
            "is not a CORE bundle",
        ),
        ("core.yaml", "icl_tasks: [3]", "is not a CORE bundle"),
        ("core.yaml", "[" * 100_000, "is not a CORE bundle"),
        ("eval_data/mc.jsonl", "{", r"mc\.jsonl:1: is not JSON"),
        ("eval_data/mc.jsonl", "[3]", r"mc\.jsonl:1: is not a multiple_choice item"),
        ("eval_data/mc.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}', r"mc\.jsonl:1: its gold is not"),
        ("eval_data/mc.jsonl", '{"query": "a", "choices": [3], "gold": 0}', r"mc\.jsonl:1: its gold is not"),
    ],
)
def test_a_bundle_from_elsewhere_is_read_within_its_folder_or_refused_in_one_line(bundle, name, content, said):
    (bundle / "eval_bundle" / name).write_text(content)
    with pytest.raises(DataError, match=said) as raised:
        TaskItems.load(read_bundle(bundle)[0])
    assert str(raised.value).isprintable()


def test_chunks_hold_every_item_once_longest_first(bundle):
    items = TaskItems.load(read_bundle(bundle)[0])
    chunks = plan(items, 100)

    assert sorted(index for chunk in chunks for index in chunk) == list(range(14)) and len(chunks) > 3
    assert items.characters(chunks[0][0]) == max(items.characters(index) for index in range(14))


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_common_prefix(sequences):
    expected = 0
    while all(len(s) > expected for s in sequences) and len({s[expected] for s in sequences}) == 1:
        expected += 1

    assert common_prefix(sequences) == expected


@pytest.mark.skipif(not SHARED_BUNDLE.exists(), reason="the shared bundle is not here")
def test_the_real_bundle_renders(tmp_path):
    import zipfile

    with zipfile.ZipFile(SHARED_BUNDLE) as archive:
        archive.extractall(tmp_path)
    tasks = read_bundle(tmp_path)

    assert len(tasks) == 14 and {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in tasks:
        items = TaskItems.load(task, max_per_task=3)
        for question in encode(items, range(items.count), Bytes(), 1 << 20):
            for option in question.options:
                assert 0 < option.start < option.end <= len(option.ids)
            assert question.gold < len(question.options)


def test_core_task_baselines_are_parts_of_one(bundle):
    assert read_bundle(bundle)[0] == CoreTask(
        "mc", "multiple_choice", bundle / "eval_bundle/eval_data/mc.jsonl", 3, "\nAnswer: ", 0.4
    )
