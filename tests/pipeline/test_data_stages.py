"""download -> tokenizer -> tokenize -> pack as they run: real processes, killed and damaged and asked to stop."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from small_hub import SmallHub

from data.errors import DataError, HelperDied
from data.helpers import run_in_helpers
from data.sources import web
from data.text.files import documents, write_shard
from data.tokens.packing import BatchOrder, PackedRows, ValidationRows
from data.tokens.tokenizer import Tokenizer
from pipeline.job import Job, Launch, Stopped
from pipeline.stages import download, pack, tokenize, tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    a + b + c for a in ("ba", "do", "mi", "ker", "s") for b in ("lo", "ri", "an", "u") for c in ("t", "n", "", "des")
]


def some_documents(count: int, seed: int, words: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, words))) + "." for _ in range(count)]


def write_text(folder: Path, train: int, count: int = 40, words: int = 60) -> Path:
    """A download artifact of `train` shards and one to validate."""
    folder.mkdir(parents=True)
    names = [f"shard_{i:05d}.parquet" for i in range(train)]
    for i, name in enumerate(names):
        write_shard(folder / name, some_documents(count, i, words))
    write_shard(folder / "val.parquet", some_documents(count, 1000, words))
    (folder / "shards.json").write_text(json.dumps({"train": names, "val": "val.parquet", "column": "text"}))
    return folder


def run(module, work: Path, params, inputs: dict[str, Path], store: Path, workers: int = 1, identity=None) -> Path:
    job = Job(work.name, "key", params, Launch(workers=workers), inputs, work, store, data_identity=identity)
    module.main(job)
    return job.out


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("vocabulary")
    text = write_text(base / "text", 1, count=300)
    return run(tokenizer, base / "tokenizer", tokenizer.Params(vocab_size=350), {"text": text}, base)


def test_from_a_hub_to_rows(tmp_path, vocabulary):
    hub = SmallHub(tmp_path / "hub")
    for i in range(4):
        shard = hub.root / f"datasets/org/text/shard_{i:05d}.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        write_shard(shard, some_documents(50, i))
    hub.faults["shard_00001.parquet"] = ["drop", "corrupt", "error"]
    params = download.Params("data.sources.hub", repo_id="org/text", train_shards=3, val_shard="shard_00003.parquet")
    with hub.serving():
        found = download.data_identity(params, {"endpoint": hub.url}, online=True)
        shards = run(download, tmp_path / "download", params, {}, tmp_path, workers=2, identity=found)

    tokens = run(
        tokenize, tmp_path / "tokenize", tokenize.Params(), {"shards": shards, "tokenizer": vocabulary}, tmp_path
    )
    packed = run(pack, tmp_path / "pack", pack.Params("bestfit", 32), {"tokens": tokens}, tmp_path)

    listing = json.loads((tokens / "tokens.json").read_text())
    encoder = Tokenizer.load(vocabulary)
    assert [(s["name"], s["split"]) for s in listing["shards"]] == [
        *((f"shard_{i:05d}", "train") for i in range(3)),
        ("shard_00003", "val"),
    ]
    assert listing["dtype"] == "uint16" and listing["bos"] == encoder.bos and listing["vocab_size"] == 350
    for i, shard in enumerate(listing["shards"]):
        ids = np.load(tokens / f"{shard['name']}.tokens.npy", mmap_mode="r")
        offsets = np.load(tokens / f"{shard['name']}.offsets.npy")
        texts = [encoder.decode(ids[a + 1 : b].tolist()) for a, b in pairwise(offsets)]
        assert texts == some_documents(50, i)
        assert np.flatnonzero(ids == encoder.bos).tolist() == offsets[:-1].tolist()
        assert shard["documents"] == 50 and shard["tokens"] == len(ids) == offsets[-1]
    rows = PackedRows(tokens, packed)
    inputs, targets = rows.gather(BatchOrder(len(rows), 4, seed=0).step_rows(0))
    assert inputs.shape == targets.shape == (4, 32) and (inputs[:, 0] == encoder.bos).all()
    assert ValidationRows(tokens, 32, 320).gather(np.array([0]))[0][0, 0] == encoder.bos


def token_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_helpers_makes_the_same_files(tmp_path, vocabulary):
    text = write_text(tmp_path / "text", 4)
    inputs = {"shards": text, "tokenizer": vocabulary}
    one = run(tokenize, tmp_path / "one", tokenize.Params(), inputs, tmp_path / "store1", workers=1)
    three = run(tokenize, tmp_path / "three", tokenize.Params(), inputs, tmp_path / "store3", workers=3)
    assert token_bytes(one) == token_bytes(three)


def made_at(store: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in store.glob(f"tokens/*/{'?' * 64}/tokens.npy")}


def test_more_shards_cost_only_themselves_and_a_damaged_one_is_made_again(tmp_path, vocabulary):
    store = tmp_path / "store"
    few, more = write_text(tmp_path / "few", 2), write_text(tmp_path / "more", 4)
    run(tokenize, tmp_path / "a", tokenize.Params(), {"shards": few, "tokenizer": vocabulary}, store)
    first = made_at(store)

    out = run(tokenize, tmp_path / "b", tokenize.Params(), {"shards": more, "tokenizer": vocabulary}, store)

    assert len(first) == 3 and len(made_at(store)) == 5
    assert {sha256: made_at(store)[sha256] for sha256 in first} == first
    whole = token_bytes(out)
    victim = next(store.glob("tokens/*/*/tokens.npy"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    again = run(tokenize, tmp_path / "c", tokenize.Params(), {"shards": more, "tokenizer": vocabulary}, store)
    assert token_bytes(again) == whole
    assert sum(made_at(store)[sha256] == time for sha256, time in first.items()) >= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_shard_is_named(tmp_path, vocabulary, workers):
    text = write_text(tmp_path / "text", 3)
    shard = text / "shard_00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"shard_00001.parquet: is a truncated or damaged parquet file"):
        inputs = {"shards": text, "tokenizer": vocabulary}
        run(tokenize, tmp_path / "work", tokenize.Params(), inputs, tmp_path / "store", workers)


def test_a_damaged_page_inside_a_shard_is_named(tmp_path, vocabulary):
    text = write_text(tmp_path / "text", 1, count=3000)
    shard = text / "shard_00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = os.urandom(2000)
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"shard_00000.parquet: is a truncated or damaged parquet file"):
        run(tokenize, tmp_path / "w", tokenize.Params(), {"shards": text, "tokenizer": vocabulary}, tmp_path / "store")


def test_shards_of_one_name_in_two_folders_stay_two(tmp_path, vocabulary):
    text = tmp_path / "text"
    names = ["train/0.parquet", "val/0.parquet"]
    for i, name in enumerate(names):
        (text / name).parent.mkdir(parents=True)
        write_shard(text / name, some_documents(40, i))
    (text / "shards.json").write_text(json.dumps({"train": names[:1], "val": names[1], "column": "text"}))
    tokens = run(tokenize, tmp_path / "tokens", tokenize.Params(), {"shards": text, "tokenizer": vocabulary}, tmp_path)
    packed = run(pack, tmp_path / "pack", pack.Params("bestfit", 32), {"tokens": tokens}, tmp_path)
    decode, bos = Tokenizer.load(vocabulary).decode, "<|bos|>"
    for rows, name in ((PackedRows(tokens, packed), names[0]), (ValidationRows(tokens, 32), names[1])):
        written = "".join(bos + document for part in documents(text / name) for document in part)
        assert decode(rows.gather(np.array([0]))[0][0][:20].tolist()) in written


def test_a_shard_without_text_is_named(tmp_path, vocabulary):
    text = write_text(tmp_path / "text", 1)
    write_shard(text / "shard_00000.parquet", ["", ""])
    with pytest.raises(DataError, match=r"shard_00000.parquet: has no text in the column 'text'"):
        run(tokenize, tmp_path / "w", tokenize.Params(), {"shards": text, "tokenizer": vocabulary}, tmp_path / "store")


def write_job(work: Path, stage: str, params: dict, inputs: dict[str, Path], store: Path) -> list[str]:
    """The command that runs a stage with two helper processes."""
    work.mkdir()
    job = {
        "stage": stage,
        "key": "key",
        "module": f"pipeline.stages.{stage}",
        "params": params,
        "launch": {"workers": 2},
        "inputs": {name: str(folder) for name, folder in inputs.items()},
        "work": str(work),
        "store": str(store),
    }
    (work / "job.json").write_text(json.dumps(job))
    return [sys.executable, "-m", "pipeline.stages", str(work / "job.json")]


def kill_once(command: list[str], begun) -> None:
    """kill -9 when begun() is true; no helper may be left."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not begun() and process.poll() is None:
        time.sleep(0.005)  # leaves the core to what is waited for
    helpers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert helpers
    psutil.wait_procs(helpers, timeout=20)
    assert not [helper for helper in helpers if helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE]


def test_kill_9_leaves_no_process_and_costs_at_most_the_shards_at_work(tmp_path, vocabulary):
    store, inputs = (
        tmp_path / "store",
        {"shards": write_text(tmp_path / "text", 6, count=4000), "tokenizer": vocabulary},
    )
    command = write_job(tmp_path / "work", "tokenize", {}, inputs, store)
    kill_once(command, lambda: made_at(store))
    done = made_at(store)
    assert 1 <= len(done) < 7

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
    after = made_at(store)
    assert len(after) == 7 and {sha256: after[sha256] for sha256 in done} == done
    shutil.rmtree(store)
    straight = run(tokenize, tmp_path / "straight", tokenize.Params(), inputs, store)
    assert token_bytes(straight) == token_bytes(tmp_path / "work" / "out")


def test_kill_9_while_the_tokenizer_counts_keeps_the_shards_that_are_counted(tmp_path):
    store, inputs = tmp_path / "store", {"text": write_text(tmp_path / "text", 6, count=6000)}
    command = write_job(tmp_path / "work", "tokenizer", {"vocab_size": 350}, inputs, store)

    def counted() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("scratch/*.parquet")}

    kill_once(command, counted)
    done = counted()
    assert 1 <= len(done) < 6

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
    after = counted()
    assert len(after) == 6 and {name: after[name] for name in done} == done
    straight = run(tokenizer, tmp_path / "straight", tokenizer.Params(vocab_size=350), inputs, store)
    assert (straight / "tokenizer.json").read_bytes() == (tmp_path / "work/out/tokenizer.json").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_stop_it_keeps_what_is_done(tmp_path, vocabulary, workers):
    text = write_text(tmp_path / "text", 3)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "stop").touch()
    with pytest.raises(Stopped):
        inputs = {"shards": text, "tokenizer": vocabulary}
        run(tokenize, tmp_path / "work", tokenize.Params(), inputs, tmp_path / "store", workers)


def test_a_helper_that_is_killed_is_a_failure_of_memory():
    with pytest.raises(HelperDied, match=r"Lower launch.workers") as raised:
        run_in_helpers(_die_on_three, [1, 2, 3, 4], 2, lambda value: None, lambda: False)
    assert raised.value.cause == "oom"


def _die_on_three(item: int, report) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_too_little_text_for_one_row_is_said_with_both_numbers(tmp_path, vocabulary):
    text = write_text(tmp_path / "text", 1, count=2)
    tokens = run(tokenize, tmp_path / "t", tokenize.Params(), {"shards": text, "tokenizer": vocabulary}, tmp_path / "s")
    for method in ("stream", "bestfit"):
        with pytest.raises(DataError, match=r"training tokens do not fill one row of 5001"):
            run(pack, tmp_path / method, pack.Params(method, 5000), {"tokens": tokens}, tmp_path)


def test_the_public_data_comes_whole_through_a_faulty_line(tmp_path, shared_hub, monkeypatch):
    monkeypatch.setattr(web, "LONGEST_PAUSE_SECONDS", 0.05)
    server_path = shared_hub.parent / "tools" / "hub_server.py"
    faults = ["--error-rate", "0.2", "--drop-rate", "0.2", "--corrupt-rate", "0.1", "--seed", "3"]
    server = subprocess.Popen(
        [sys.executable, str(server_path), "--port", "0", *faults], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        endpoint = server.stdout.readline().split()[-1]
        wanted = {
            "text": download.Params(
                "data.sources.hub",
                repo_id="karpathy/fineweb-edu-100b-shuffle",
                train_shards=4,
                val_shard="shard_00005.parquet",
            ),
            "gsm8k": download.Params(
                "data.sources.hub", what="dataset", repo_id="openai/gsm8k", files=["main/*.parquet"]
            ),
            "core": download.Params(
                "data.sources.url", what="dataset", urls=["http://127.0.0.1:9/eval_bundle.zip"], extract=True
            ),
        }
        out = {}
        for name, params in wanted.items():
            found = download.data_identity(params, {"endpoint": endpoint}, online=True)
            out[name] = run(download, tmp_path / name, params, {}, tmp_path / "store", workers=4, identity=found)
    finally:
        server.kill()
        server.wait()
    for i in (0, 1, 2, 3, 5):
        name = f"shard_{i:05d}.parquet"
        original = shared_hub / "datasets" / "karpathy" / "fineweb-edu-100b-shuffle" / name
        assert (out["text"] / name).read_bytes() == original.read_bytes()
    assert sum(map(len, documents(out["gsm8k"] / "main/test-00000-of-00001.parquet", "question"))) == 1319
    assert (out["core"] / "eval_bundle" / "core.yaml").is_file()
    assert len(list((tmp_path / "store" / "blobs").glob("?*"))) == 5 + 2 + 1 + 1  # and the folder for partial files
