"""render: a mixture becomes rows that hold every conversation that fits, and nothing without something to learn."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.chat.conversation import render
from data.chat.rows import ConversationRows
from data.errors import DataError
from data.tasks.mixture import TaskSpec, load_task
from data.tasks.task import TaskError
from data.tokens import bpe
from data.tokens.tokenizer import Tokenizer
from pipeline.job import Job, Launch, Stopped
from pipeline.stages import render as stage
from pipeline.stages.render import Params

ROOT = Path(__file__).resolve().parent.parent.parent
ARITHMETIC = "data.tasks.arithmetic.Arithmetic"
SMOLTALK = "data.tasks.smoltalk.SmolTalk"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(bpe.train([path.read_text() for path in (ROOT / "data").rglob("*.py")], 600), folder)
    return folder


@pytest.fixture(scope="session")
def talk(tmp_path_factory, request):
    """SmolTalk's files where they are there, else a small set in its schema with what may go wrong in one."""
    shared = ROOT.parent / "shared" / "hub" / "datasets" / "HuggingFaceTB" / "smol-smoltalk"
    if shared.is_dir():
        return shared
    folder = tmp_path_factory.mktemp("smoltalk")
    (folder / "data").mkdir()
    conversations = []
    for i in range(600):
        turns = [("system", "Be brief.")] * (i % 5 == 0)
        for turn in range(1 + i % 4):
            turns += [("user", f"question {turn} " * (1 + i % 37)), ("assistant", f"answer {i} " * (1 + i % 19))]
        conversations.append([{"role": role, "content": content} for role, content in turns])
    table = pa.table({"messages": conversations, "source": ["made"] * len(conversations)})
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=100)
    return folder


def make_job(tmp_path, tokenizer_folder, params, workers=2, **datasets):
    inputs = {"tokenizer": tokenizer_folder} | {f"dataset/{name}": folder for name, folder in datasets.items()}
    return Job(
        stage="sft_data",
        key="k",
        params=params,
        launch=Launch(workers=workers),
        inputs=inputs,
        work=tmp_path,
        store=tmp_path / "store",
    )


def write_jsonl(path, *conversations):
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    return str(path)


def turns(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("sequence_len", [64, 128, 512])
def test_every_row_has_something_to_learn_at_any_context(sequence_len, tmp_path, tokenizer_folder, talk):
    spec = TaskSpec(SMOLTALK, dataset="smoltalk", size=500)
    job = make_job(tmp_path, tokenizer_folder, Params([spec], sequence_len=sequence_len), smoltalk=talk)
    metrics = stage.main(job)
    rows = ConversationRows(job.out)
    assert len(rows) == metrics["rows"] > 0
    tokens, targets = rows.gather(np.arange(len(rows)))
    assert tokens.shape == targets.shape == (len(rows), sequence_len)
    assert tokens.dtype == targets.dtype == np.int64
    assert (targets >= 0).any(axis=1).all()
    assert metrics["conversations"] + metrics["dropped"] == 500
    assert metrics["trained_tokens"] == (targets >= 0).sum()
    assert metrics["cut"] > 0 or sequence_len == 512
    # Each row begins with a conversation, and every conversation that begins ends with an assistant's turn.
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert (tokens[:, 0] == tokenizer.bos).all()
    assert metrics["filled"] > 0.6


def test_masked_rows_are_the_conversations_themselves(tmp_path, tokenizer_folder):
    said = [turns("Hi", "Hello!"), turns("What is 1+1?", "2", "And 1+2?", "3")]
    spec = TaskSpec("data.tasks.custom_json.CustomJSON", file=write_jsonl(tmp_path / "own.jsonl", *said))
    job = make_job(tmp_path / "work", tokenizer_folder, Params([spec], sequence_len=200))
    assert stage.main(job)["rows"] == 1
    tokens, mask = ConversationRows(job.out).row(0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    parts = [render({"messages": messages}, tokenizer) for messages in said]
    expected = {(tuple(a[0] + b[0]), tuple(a[1] + b[1])) for a, b in (parts, parts[::-1])}
    used = len(parts[0][0]) + len(parts[1][0])
    assert (tuple(tokens[:used]), tuple(mask[:used])) in expected
    assert (tokens[used:] == tokenizer.bos).all() and not mask[used:].any()


def test_everything_but_padding_counts_when_asked_for(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "own.jsonl", turns("Hi", "Hello!"))
    params = Params([TaskSpec("data.tasks.custom_json.CustomJSON", file=file)], sequence_len=64, mask="all")
    job = make_job(tmp_path / "work", tokenizer_folder, params)
    metrics = stage.main(job)
    _, targets = ConversationRows(job.out).gather(np.array([0]))
    assert (targets >= 0).sum() == metrics["tokens"] - 1 == metrics["trained_tokens"]


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_an_answer_of_weight_0_is_never_trained_on(tmp_path, tokenizer_folder, mask):
    said = turns("Hi", "WRONG", "Again", "right")
    said[1]["weight"], said[3]["weight"] = 0, 1
    file = write_jsonl(tmp_path / "own.jsonl", {"messages": said, "id": 3})
    params = Params([TaskSpec("data.tasks.custom_json.CustomJSON", file=file)], sequence_len=64, mask=mask)
    job = make_job(tmp_path / "work", tokenizer_folder, params)
    stage.main(job)
    tokens, trained = ConversationRows(job.out).row(0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert "WRONG" in tokenizer.decode(tokens.tolist())
    learnt = tokenizer.decode(tokens[trained == 1].tolist())
    assert "WRONG" not in learnt and "right" in learnt and ("Again" in learnt) == (mask == "all")
    assert "CustomJSON: fields 'id' ignored: 1" in (job.work / "said.txt").read_text()


def test_what_does_not_fit_is_cut_at_a_turn_or_dropped_and_counted(tmp_path, tokenizer_folder):
    long = "word " * 300
    said = [turns("Hi", "Hello!"), turns("Hi", "Yes?", long, "No."), turns(long, "No."), turns("Hi", long)]
    spec = TaskSpec("data.tasks.custom_json.CustomJSON", file=write_jsonl(tmp_path / "own.jsonl", *said))
    job = make_job(tmp_path / "work", tokenizer_folder, Params([spec], sequence_len=64))
    metrics = stage.main(job)
    assert (metrics["conversations"], metrics["cut"], metrics["dropped"]) == (2, 1, 2)
    described = json.loads((job.out / "rows.json").read_text())
    assert described["dropped_because"] == {"too_long": 2, "untrained": 0, "malformed": 0, "empty": 0}
    tokens, mask = ConversationRows(job.out).row(0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    end = tokenizer.special["<|assistant_end|>"]
    assert (tokens == end).sum() == 2 and mask[tokens == end].all()


def test_conversations_of_a_data_set_that_cannot_be_learnt_from_are_dropped_and_counted(tmp_path, tokenizer_folder):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    messages = [turns("Hi", "Hello!"), turns("Hi"), [{"role": "assistant", "content": "Hm"}], []]
    messages += [turns("Hi", " "), turns("Hi", "", "Hi", "Hello!")]
    pq.write_table(pa.table({"messages": messages}), folder / "data" / "train-0.parquet")
    job = make_job(
        tmp_path / "work", tokenizer_folder, Params([TaskSpec(SMOLTALK, dataset="own")], sequence_len=64), own=folder
    )
    metrics = stage.main(job)
    assert (metrics["conversations"], metrics["dropped"]) == (1, 5)
    because = json.loads((job.out / "rows.json").read_text())["dropped_because"]
    assert because == {"too_long": 0, "untrained": 1, "malformed": 2, "empty": 2}


def test_a_mixture_that_leaves_no_row_is_an_error_in_one_sentence(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "own.jsonl", turns("word " * 100, "No."))
    params = Params([TaskSpec("data.tasks.custom_json.CustomJSON", file=file)], sequence_len=64)
    with pytest.raises(DataError, match="not one of 1 conversations"):
        stage.main(make_job(tmp_path / "work", tokenizer_folder, params))
    with pytest.raises(TaskError, match="at least one task"):
        stage.main(make_job(tmp_path / "none", tokenizer_folder, Params([])))


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


MIXTURE = [
    TaskSpec(ARITHMETIC, size=3000),
    TaskSpec("data.tasks.chitchat.Chitchat", size=1500),
    TaskSpec("data.tasks.identity.Identity", repeat=2),
]


def test_rows_depend_on_the_params_alone(tmp_path, tokenizer_folder):
    made = []
    for name, workers, seed in (("one", 1, 0), ("four", 4, 0), ("other", 1, 1)):
        job = make_job(tmp_path / name, tokenizer_folder, Params(MIXTURE, sequence_len=128, seed=seed), workers)
        stage.main(job)
        made.append(files_of(job.out))
    assert made[0] == made[1]
    assert made[0]["rows.tokens.npy"] != made[2]["rows.tokens.npy"]


def test_a_sequence_keeps_its_tasks_apart_and_in_order(tmp_path, tokenizer_folder):
    job = make_job(tmp_path, tokenizer_folder, Params(MIXTURE, order="sequence", sequence_len=128))
    stage.main(job)
    rows = ConversationRows(job.out)
    call = Tokenizer.load(tokenizer_folder).special["<|python_start|>"]
    sums = (rows.tokens == call).any(axis=1)
    assert sums[: len(rows) // 4].all() and not sums[-len(rows) // 8 :].any()
    order = rows.order(rows_per_step=4, seed=0)
    assert order.step_rows(1).tolist() == [4, 5, 6, 7]


def test_stopped_or_killed_it_goes_on_with_the_next_chunk(tmp_path, tokenizer_folder):
    params = Params(MIXTURE, sequence_len=128)
    whole = make_job(tmp_path / "whole", tokenizer_folder, params)
    stage.main(whole)

    job = make_job(tmp_path / "part", tokenizer_folder, params)
    (job.work / "stop").touch()
    with pytest.raises(Stopped, match="0 of"):
        stage.main(job)
    (job.work / "stop").unlink()
    kill_in_second_chunk(tmp_path / "part", tokenizer_folder)
    first = job.scratch / "0.fates.npy"
    assert first.exists() and not (job.scratch / "4096.fates.npy").exists()
    before = first.stat().st_mtime_ns
    stage.main(job)
    assert first.stat().st_mtime_ns == before
    assert files_of(job.out) == files_of(whole.out)


def kill_in_second_chunk(work, tokenizer_folder):
    """Run the stage in a process that dies by SIGKILL while it writes its second chunk."""
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
import test_render as test
save, saved = test.stage._save, []
def save_or_die(job, name, array):
    saved.append(name)
    if len(saved) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(job, name, array)
test.stage._save = save_or_die
params = test.Params(test.MIXTURE, sequence_len=128)
test.stage.main(test.make_job(Path({str(work)!r}), Path({str(tokenizer_folder)!r}), params))
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


REVERSED = '''
from data.tasks.task import Draw, held_out
from data.tasks.task import Task, dialogue


class Reversed(Task):
    """Saying a number backwards."""

    def __init__(self, split="train", size=None, folder=None, file=None, digits: int = 4):
        super().__init__(split, size or 100, folder, file)
        numbers = [str(n) for n in range(10**digits) if held_out(f"reversed {n}") == (split == "test")]
        self.numbers = [numbers[i] for i in Draw("reversed").order(len(numbers))][: self.size]

    def __len__(self):
        return len(self.numbers)

    def conversation(self, i):
        return dialogue(f"Reverse {self.numbers[i]}", self.numbers[i][::-1])

    def grade(self, i, completion, execute=None):
        return float(completion == self.numbers[i][::-1])
'''


def test_a_new_task_is_one_file_and_one_line(tmp_path, tokenizer_folder, monkeypatch):
    (tmp_path / "reversing.py").write_text(REVERSED)
    monkeypatch.syspath_prepend(tmp_path)
    line = TaskSpec("reversing.Reversed", size=50, args={"digits": 3})
    metrics = stage.main(make_job(tmp_path / "work", tokenizer_folder, Params([line], sequence_len=64)))
    assert metrics["conversations"] == 50
    graded = load_task(TaskSpec("reversing.Reversed", split="test"), None)
    assert graded.grade(0, graded.conversation(0)["messages"][1]["content"]) == 1.0
