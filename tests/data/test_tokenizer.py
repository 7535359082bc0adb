"""One tokenizer.json, the same ids in tiktoken and in tokenizers, for every text; nothing is lost in a round trip."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.text.files import write_shard
from data.tokens import bpe
from data.tokens.tokenizer import LONGEST_SPACE, SPECIAL_TOKENS, Tokenizer
from pipeline.job import Job, Launch
from pipeline.stages import tokenizer as stage
from tests.conftest import tries

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "hello", "world", "it's", "we'll", "1234"]


def some_texts(count: int) -> list[str]:
    draw = random.Random(0)
    scripts = [
        "naïve café",
        "Ελληνικά",
        "русский",
        "中文字符",
        "日本語",
        "العربية",
        "हिन्दी",
        "👩‍👩‍👧 🇩🇪",
        "\t\tif x:\r\n",
        "===",
        "\u00a0",
    ]
    return [
        " ".join(draw.choice(WORDS if draw.random() < 0.8 else scripts) for _ in range(draw.randrange(1, 60))) + "\n"
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small tokenizer, as the stage makes it."""
    text = tmp_path_factory.mktemp("text")
    for i in range(2):
        write_shard(text / f"s{i}.parquet", some_texts(600)[i::2])
    (text / "shards.json").write_text(
        json.dumps({"train": ["s0.parquet", "s1.parquet"], "val": None, "column": "text"})
    )
    work = tmp_path_factory.mktemp("work")
    job = Job("tokenizer", "key", stage.Params(vocab_size=420), Launch(), {"text": text}, work, work)
    metrics = stage.main(job)
    assert metrics["vocab_size"] == 420 and metrics["bytes_per_token"] > 1.5
    return job.out


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from tokenizers import Tokenizer as Other

    return Other.from_file(str(folder / "tokenizer.json"))


odd_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("'sSſtTlLvVeErRdDmM \n\r\t\u0085\u00a0\u2028\u3000\x1c\x1f\u200d\ufeff\u0301İıẞ٣Ⅷ²0123456789"),
        st.sampled_from("the of and to in is that it was"),
    ),
    max_size=60,
)


@settings(max_examples=tries(400), deadline=None)
@given(text=odd_text)
@example("<|bos|>hello<|user_end|>")
@example("'LL 'ſ 'Ve  \r\n \n  x")
def test_text_comes_back_and_both_libraries_agree(ours, theirs, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(ours.special.values())
    theirs.encode_special_tokens = True  # text that spells a special token stays text, as for us
    assert theirs.encode(text).ids == ids
    theirs.encode_special_tokens = False
    assert theirs.encode(text).ids == ours.encoding.encode(text, allowed_special="all")


def test_both_libraries_agree_on_whole_documents(ours, theirs):
    texts = some_texts(200)
    assert (
        ours.encode_batch(texts) == ours.encode_batch(texts, threads=2) == [e.ids for e in theirs.encode_batch(texts)]
    )
    assert theirs.decode(ours.encode(texts[0])) == texts[0]


def test_special_tokens_come_last_in_their_order(ours, theirs):
    assert list(ours.special) == list(SPECIAL_TOKENS)
    assert list(ours.special.values()) == list(range(411, 420)) and ours.bos == 411
    assert ours.vocab_size == theirs.get_vocab_size() == 420
    assert ours.decode([ours.special["<|user_start|>"], *ours.encode("hi")]) == "<|user_start|>hi"
    assert [theirs.token_to_id(name) for name in SPECIAL_TOKENS] == list(ours.special.values())


def test_token_bytes_count_the_text_and_no_special_token(ours, folder):
    counted = np.load(folder / "token_bytes.npy")
    assert counted.dtype == np.int32 and counted.shape == (420,)
    assert counted.tolist() == ours.token_bytes.tolist()
    text = "Ελληνικά and 12345 👩‍👩‍👧"
    assert counted[ours.encode(text)].sum() == len(text.encode())
    assert counted[411:].tolist() == [0] * 9


def test_halves_of_characters_and_endless_space_do_no_harm(ours):
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"
    for text in (" " * 1_200_000, "x" + "\n" * (LONGEST_SPACE * 2 + 5) + "y", "a" * 300_000):
        assert ours.decode(ours.encode(text)) == text


def test_runs_of_white_space_of_any_length_cost_no_more_than_other_text(ours):
    started = time.process_time()
    ours.encode((" " * (LONGEST_SPACE - 10) + "x") * 20)
    assert time.process_time() - started < 5  # half a minute where each space looks for all that follow it


def test_the_evaluation_says_what_it_could_not_compare(folder):
    evaluation = json.loads((folder / "evaluation.json").read_text())
    compared = evaluation["bytes_per_token"]
    assert compared["this"] > 1.5
    for name in ("GPT-2", "GPT-4"):
        assert isinstance(compared[name], float) or "not in tiktoken's cache" in compared[name]["skipped"]


def test_training_is_on_the_start_of_documents_up_to_a_limit_without_what_it_is_measured_on(folder, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    write_shard(text / "s.parquet", [f"{i:04d} " + "z" * 500 for i in range(200)])
    (text / "shards.json").write_text(json.dumps({"train": ["s.parquet"], "val": None, "column": "text"}))
    params = stage.Params(vocab_size=270, max_chars=2000, doc_cap=100, eval_chars=150)
    job = Job("tokenizer", "key", params, Launch(), {"text": text}, tmp_path / "w", tmp_path)
    (shard,) = stage._shards(job)
    train = [part for part, held in shard.text.parts() if not held]
    held_out = list(shard.text.held_out())
    assert len(train) == 20 and all(len(t) == 100 for t in train)
    assert held_out == ["0000 " + "z" * 95] and held_out[0] not in train


@pytest.mark.parametrize("vocab_size, said", [(264, "264 is too small"), (5000, "is more than the text gives")])
def test_a_vocabulary_of_a_wrong_size_is_refused(vocab_size, said):
    with pytest.raises(DataError, match=said):
        bpe.train(["hello world"] * 3, vocab_size)
    assert len(bpe.train(["hello world"] * 3, 265)) == 256


def test_a_vocabulary_that_nobody_asked_for_is_what_the_text_gives_and_says_so(tmp_path):
    """max_vocab_size is a recipe's default, vocab_size the user's wish."""
    text = tmp_path / "text"
    text.mkdir()
    write_shard(text / "s.parquet", [f"{i:04d} my own words" for i in range(200)])
    (text / "shards.json").write_text(json.dumps({"train": ["s.parquet"], "val": None, "column": "text"}))

    def make(**params):
        work = tmp_path / str(params)
        job = Job("tokenizer", "key", stage.Params(**params, eval_chars=150), Launch(), {"text": text}, work, tmp_path)
        return stage.main(job), job

    metrics, job = make(max_vocab_size=5000)
    made = Tokenizer.load(job.out)
    assert 265 < metrics["vocab_size"] == made.vocab_size == len(made.token_bytes) < 5000
    said = (job.work / "said.txt").read_text()
    assert f"a vocabulary of {made.vocab_size} tokens, not the 5,000 of tokenizer.params.max_vocab_size" in said
    assert "max_vocab_size" not in (make(max_vocab_size=270)[1].work / "said.txt").read_text()
    with pytest.raises(DataError, match=f"5000 is more than the text gives: it has room for {made.vocab_size}"):
        make(vocab_size=5000)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.json: there is no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"tokenizer.json: is not a byte-level BPE"):
        Tokenizer.load(tmp_path)


def learnt_from_text(texts, vocab_size):
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - len(SPECIAL_TOKENS), pattern=bpe.PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


@settings(max_examples=tries(60), deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=1, max_size=8))
@example(["I'M we'Ll 'ſ 12345 \x1c\x1d a\x85b\u2028\u3000  \r\n\n x\u00a0y"])
def test_a_vocabulary_from_counted_words_is_the_one_that_rustbpe_learns_from_the_text(texts):
    texts = texts + some_texts(40)
    assert bpe.train(texts, 420) == learnt_from_text(texts, 420)


def test_counts_are_shared_out_by_shard_kept_over_a_kill_and_add_up(tmp_path, monkeypatch):
    texts = some_texts(300)
    for i in range(3):
        write_shard(tmp_path / f"s{i}.parquet", texts[i * 100 : (i + 1) * 100])
    shards = [bpe.ShardText(tmp_path / f"s{i}.parquet", "text", 200, 10**9, 500 * (i == 0)) for i in range(3)]
    done: list[int] = []
    for i, shard in enumerate(shards):
        bpe.count_shard(shard, bpe.PATTERN, tmp_path / f"{i}.counts.parquet", done.append)
    held_out = list(shards[0].held_out())
    assert held_out == [text[:200] for text in texts[:100:50]] and len(held_out) == 2
    kept = [text[:200] for number, text in enumerate(texts) if number not in (0, 50)]
    together = sum((bpe.read_counts(tmp_path / f"{i}.counts.parquet") for i in range(3)), Counter())
    assert together == bpe.count_words(kept, bpe.PATTERN) and sum(done) == sum(map(len, kept))
    monkeypatch.setattr(bpe, "documents", None)  # a shard whose counts are there is not read again
    bpe.count_shard(shards[1], bpe.PATTERN, tmp_path / "1.counts.parquet", done.append)


def test_a_shard_gives_no_more_text_than_its_share(tmp_path):
    write_shard(tmp_path / "s.parquet", ["a" * 100] * 50)
    parts = list(bpe.ShardText(tmp_path / "s.parquet", "text", 60, 600).parts())
    assert parts == [("a" * 60, False)] * 10


def without(document, name):
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != name]


@pytest.mark.parametrize(
    "change",
    [
        lambda document: without(document, "<|bos|>"),
        lambda document: without(document, "<|output_end|>"),
        lambda document: document["added_tokens"][0].update(id=7),
        lambda document: document["added_tokens"][0].update(id="7"),
        lambda document: document["model"].update(vocab=[]),
        lambda document: document["model"]["vocab"].update({"\u4e2d": 1}),
        lambda document: document.update(pre_tokenizer=None),
    ],
)
def test_a_tokenizer_that_is_not_one_of_ours_is_one_line(tmp_path, change):
    bpe.save(bpe.train(["the mill grinds the meal of the miller"] * 20, 275), tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))

    with pytest.raises(DataError, match="is not a byte-level BPE tokenizer of this project") as error:
        Tokenizer.load(tmp_path)

    assert "\n" not in str(error.value)
