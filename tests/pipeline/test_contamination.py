"""Evaluation questions that occur in any kind of training data are counted, and the report warns of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.tasks.mixture import CoreSpec, TaskSpec
from data.tokens import bpe
from data.tokens.tokenizer import Tokenizer
from pipeline.job import Job, Launch, Stopped
from pipeline.report.made import read
from pipeline.report.scores import not_contaminated, warnings
from pipeline.stages import contamination, render
from tests.pipeline.made_up import artifact
from tests.pipeline.test_evaluate import write_bundle
from tests.pipeline.test_render import turns, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
LONG = "A miller grinds eighteen sacks of wheat before noon and twenty-four after it. How many sacks are that in all?"
SHORT = "Who is it?"
OWN, SUMS = "data.tasks.custom_json.CustomJSON", "data.tasks.arithmetic.Arithmetic"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(bpe.train([path.read_text() for path in (ROOT / "data").rglob("*.py")], 600), folder)
    return folder


def write_text(folder: Path, tokenizer: Path, *documents: str) -> Path:
    """As the stage tokenize leaves training text."""
    folder.mkdir()
    tok = Tokenizer.load(tokenizer)
    stream = np.array([token for text in documents for token in [tok.bos, *tok.encode(text)]], np.uint16)
    np.save(folder / "a.tokens.npy", stream)
    shard = {"name": "a", "split": "train", "tokens": len(stream), "documents": len(documents), "sha256": ""}
    described = {"dtype": "uint16", "bos": tok.bos, "vocab_size": tok.vocab_size, "shards": [shard]}
    (folder / "tokens.json").write_text(json.dumps(described))
    return folder


def write_rows(work: Path, tokenizer: Path, *specs: TaskSpec) -> Path:
    job = Job("rows", "k", render.Params(list(specs), sequence_len=128), Launch(), {"tokenizer": tokenizer}, work, work)
    render.main(job)
    return job.out


def look(tmp_path: Path, params: contamination.Params, **inputs: Path) -> tuple[dict, Job]:
    job = Job("contamination", "k", params, Launch(), inputs, tmp_path / "work", tmp_path)
    contamination.main(job)
    return json.loads((job.out / "contamination.json").read_text()), job


def own(tmp_path: Path, name: str, *questions: str) -> TaskSpec:
    lines = [turns(question, "Yes.") for question in questions]
    return TaskSpec(OWN, name=name, file=write_jsonl(tmp_path / f"{name}.jsonl", *lines))


def test_questions_are_counted_in_text_rows_and_problems_of_rl(tmp_path, tokenizer):
    text = write_text(tmp_path / "text", tokenizer, "def mill(): pass", f"He said: {LONG} Nobody knew. {SHORT}")
    rows = write_rows(tmp_path / "rows", tokenizer, own(tmp_path, "said", "How are you today, my friend?", SHORT))
    asked = own(tmp_path, "Mill", LONG, SHORT, "Which of the wheels of this mill is the one that turns the others?")
    params = contamination.Params(tasks=[asked], rl_tasks=[own(tmp_path, "tried", LONG)])

    found, job = look(tmp_path, params, tokenizer=tokenizer, pretrain=text, sft=rows)

    assert found["tasks"]["Mill"]["found"] == {"pretrain": 1, "sft": 1, "rl": 1}
    assert {(e["source"], e["text"]) for e in found["tasks"]["Mill"]["examples"]} == {
        ("pretrain", LONG),
        ("sft", SHORT),
        ("rl", LONG),
    }
    assert found["tasks"]["Mill"]["checked"] == found["tasks"]["Mill"]["items"] == 3
    assert "Mill: 1 of 3 items are in pretrain" in (job.work / "said.txt").read_text()


def test_problems_of_a_generated_task_are_not_in_its_training_set(tmp_path, tokenizer):
    held_out = {"split": "test", "size": 500}
    rows = write_rows(tmp_path / "rows", tokenizer, TaskSpec(SUMS, size=4000), TaskSpec("data.tasks.identity.Identity"))
    tasks = [TaskSpec(SUMS, **held_out), TaskSpec("data.tasks.identity.Identity", split="test")]

    params = contamination.Params(tasks, rl_tasks=[TaskSpec(SUMS, size=500, args={"seed": 3})])
    found, _ = look(tmp_path, params, tokenizer=tokenizer, sft=rows)

    assert [(task["checked"], task["found"]) for task in found["tasks"].values()] == [(500, {}), (20, {})]
    assert found["sources"]["sft"] > 50_000 and found["sources"]["rl"] > 10_000


def test_core_is_looked_up_by_what_its_items_say(tmp_path, tokenizer):
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    clean = write_text(tmp_path / "clean", tokenizer, "def mill(): pass")
    params = contamination.Params(core=CoreSpec("core"), ngram=4)

    found, _ = look(tmp_path, params, tokenizer=tokenizer, pretrain=clean, **{"dataset/core": tmp_path / "bundle"})

    ((name, task),) = found["tasks"].items()
    assert name.startswith("CORE ") and task["items"] == 12 and task["found"] == {}


def test_a_question_below_a_system_message_is_looked_up(tmp_path, tokenizer):
    rules = {"role": "system", "content": "Answer as a miller would, in one short sentence and without any swearing."}
    lines = [[rules, *turns(f"{LONG} And of rye, {number} sacks?", "Yes.")] for number in (17, 23, 31, 47, 59)]
    spec = TaskSpec(OWN, name="asked", file=write_jsonl(tmp_path / "asked.jsonl", *lines))
    train = own(tmp_path, "train", f"{rules['content']}\n\n{LONG} And of rye, 31 sacks?")
    rows = write_rows(tmp_path / "rows", tokenizer, train)

    found, _ = look(tmp_path, contamination.Params([spec], ngram=5), tokenizer=tokenizer, sft=rows)

    assert found["tasks"]["asked"]["checked"] == 5
    assert found["tasks"]["asked"]["found"] == {"sft": 1}


def test_it_stops_when_asked_to(tmp_path, tokenizer):
    text = write_text(tmp_path / "text", tokenizer, LONG)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "stop").touch()

    with pytest.raises(Stopped, match="finished parts of the training data are kept"):
        look(tmp_path, contamination.Params([own(tmp_path, "Mill", LONG)]), tokenizer=tokenizer, pretrain=text)


def test_a_part_that_was_looked_through_before_a_kill_is_not_read_again(tmp_path, tokenizer, monkeypatch):
    inputs = {"tokenizer": tokenizer, "pretrain": write_text(tmp_path / "text", tokenizer, LONG)}
    params = contamination.Params([own(tmp_path, "Mill", LONG)])
    before, _ = look(tmp_path, params, **inputs)

    monkeypatch.setattr(contamination, "scan", None)
    again, _ = look(tmp_path, params, **inputs)

    assert again == before and again["tasks"]["Mill"]["found"] == {"pretrain": 1}


def test_the_report_warns_of_what_was_found_or_says_that_nothing_was(tmp_path):
    task = {"items": 164, "checked": 164, "found": {"sft": 3}, "examples": []}
    nothing = {"ngram": 13, "sources": {"pretrain": 2_000_000}, "tasks": {"HumanEval": task | {"found": {}}}}
    some = artifact(
        tmp_path,
        "contamination",
        "contamination",
        {},
        files={"contamination.json": nothing | {"tasks": {"HumanEval": task}}},
    )
    none = artifact(tmp_path, "other", "contamination", {}, files={"contamination.json": nothing})

    warned = warnings(read({"contamination": some}))

    assert warned == [
        "Contamination: evaluation questions are in the training data (four fifths of their n-grams), in that of sft: "
        "HumanEval 3 of 164."
    ]
    nowhere = artifact(tmp_path, "empty", "contamination", {}, files={"contamination.json": nothing | {"tasks": {}}})
    assert not_contaminated(read({"contamination": nowhere})) == []  # nothing was looked for
    assert warnings(read({"contamination": none})) == [] and not_contaminated(read({"contamination": some})) == []
    assert not_contaminated(read({"contamination": none})) == [
        "Contamination check: no evaluation question has four fifths of its 13-grams in 2 M training tokens."
    ]
