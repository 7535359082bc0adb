"""Packed rows lose nothing they should keep, and the order of rows depends on seed and step alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.tokens.packing import BatchOrder, PackedRows, TokenSpan, ValidationRows, best_fit, in_order, window_rows
from pipeline.job import Job, Launch
from pipeline.stages import pack

BOS = 999


def write_tokens(folder: Path, train: list[list[int]], val: list[int] = ()) -> Path:
    """A `tokenize` artifact of documents of the given lengths (bos included); other tokens count up, so that no two
    places of the training text are alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, word = [], 1000
    for i, (split, lengths) in enumerate([*(("train", s) for s in train), ("val", list(val))]):
        if not lengths:
            continue
        documents = []
        for length in lengths:
            documents.append(np.array([BOS, *range(word, word + length - 1)]))
            word += length - 1
        tokens = np.concatenate(documents).astype(np.uint32)
        np.save(folder / f"s{i}.tokens.npy", tokens)
        np.save(folder / f"s{i}.offsets.npy", np.cumsum([0, *lengths]).astype(np.int64))
        shards.append({"name": f"s{i}", "split": split, "tokens": len(tokens), "documents": len(lengths)})
    described = {"dtype": "uint32", "bos": BOS, "vocab_size": 10**6, "shards": shards}
    (folder / "tokens.json").write_text(json.dumps(described))
    return folder


def run_pack(tokens: Path, work: Path, **params) -> PackedRows:
    job = Job("pack", "key", pack.Params(**params), Launch(), {"tokens": tokens}, work, work)
    pack.main(job)
    return PackedRows(tokens, job.out)


document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(shards=st.lists(document_lengths, min_size=1, max_size=3), sequence_len=st.integers(1, 50))
def test_a_stream_loses_no_token_but_the_end_that_fills_no_row(tmp_path_factory, shards, sequence_len):
    folder = tmp_path_factory.mktemp("stream")
    tokens = write_tokens(folder / "tokens", shards)
    stream = np.concatenate([np.load(path) for path in sorted((folder / "tokens").glob("*.tokens.npy"))])
    if len(stream) - 1 < sequence_len:
        with pytest.raises(DataError, match="do not fill one row"):
            run_pack(tokens, folder / "work", method="stream", sequence_len=sequence_len)
        return

    rows = run_pack(tokens, folder / "work", method="stream", sequence_len=sequence_len)

    inputs, targets = rows.gather(np.arange(len(rows)))
    assert inputs.dtype == targets.dtype == np.int64
    kept = len(rows) * sequence_len
    assert len(stream) - 1 - kept < sequence_len
    assert inputs.reshape(-1).tolist() == stream[:kept].tolist()
    assert targets.reshape(-1).tolist() == stream[1 : kept + 1].tolist()


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(document_lengths, min_size=1, max_size=3),
    sequence_len=st.integers(1, 50),
    window=st.integers(1, 50),
)
def test_best_fit_rows_are_full_start_a_document_and_use_none_twice(tmp_path_factory, shards, sequence_len, window):
    folder = tmp_path_factory.mktemp("bestfit")
    tokens = write_tokens(folder / "tokens", shards)
    params = {"method": "bestfit", "sequence_len": sequence_len, "window": window}
    if max(map(sum, shards)) < sequence_len + 1:
        with pytest.raises(DataError, match="do not fill one row"):
            run_pack(tokens, folder / "work", **params)
        return

    rows = run_pack(tokens, folder / "work", **params)

    starts_of_documents = set()
    for i in range(len(rows)):
        row = rows.row(i)
        assert row.shape == (sequence_len + 1,) and row[0] == BOS
        breaks = np.flatnonzero(np.diff(row.astype(np.int64)) != 1) + 1
        for piece in np.split(row, breaks):
            words = piece[piece != BOS]
            assert np.all(np.diff(words) == 1)  # a document's beginning, uninterrupted
            if len(words):
                assert words[0] not in starts_of_documents
                starts_of_documents.add(words[0])


@given(lengths=st.lists(st.integers(1, 100), max_size=200), row=st.integers(1, 64), window=st.integers(1, 300))
def test_best_fit_wastes_at_most_the_crops_and_one_row(lengths, row, window):
    packing = best_fit(np.array(lengths, np.int64), row, window)
    sizes = [packing.lengths[a:b].sum() for a, b in zip(packing.first, packing.first[1:])]
    assert sizes == [row] * (len(packing.first) - 1)
    assert len(set(packing.documents.tolist())) == len(packing.documents)
    unused = set(range(len(lengths))) - set(packing.documents.tolist())
    assert sum(min(lengths[i], row) for i in unused) < row


def test_best_fit_takes_the_longest_that_fits_and_crops_the_shortest():
    packing = best_fit(np.array([7, 3, 9, 4, 12]), 10, 1000)
    # 12 fills a row; 9 leaves 1, for which 3 is cropped; 7 leaves 3, for which 4 is cropped.
    assert packing.documents.tolist() == [4, 2, 1, 0, 3]
    assert packing.lengths.tolist() == [10, 9, 1, 7, 3]
    assert packing.first.tolist() == [0, 1, 3, 5]


@settings(deadline=None)
@given(
    rows=st.integers(1, 200),
    per_step=st.integers(1, 48),
    seed=st.integers(0, 10),
    steps=st.permutations(range(12)),
    window=st.one_of(st.none(), st.integers(1, 60)),
)
def test_a_step_is_the_same_rows_whichever_steps_came_before(rows, per_step, seed, steps, window):
    order = BatchOrder(rows, per_step, seed, window)
    for step in steps:
        alone = BatchOrder(rows, per_step, seed, window).step_rows(step)
        assert order.step_rows(step).tolist() == alone.tolist() and len(alone) == per_step


@settings(deadline=None)
@given(rows=st.integers(1, 300), window=st.one_of(st.none(), st.integers(1, 100)), seed=st.integers(0, 5))
def test_each_epoch_visits_every_row_once(rows, window, seed):
    order = BatchOrder(rows, 1, seed, window)
    for epoch in range(3):
        visited = order.at(np.arange(epoch * rows, (epoch + 1) * rows))
        assert sorted(visited.tolist()) == list(range(rows))


def test_epochs_differ_and_a_step_may_cross_from_one_to_the_next():
    order = BatchOrder(rows=10, rows_per_step=4, seed=1)
    steps = np.concatenate([order.step_rows(step) for step in range(5)])
    assert sorted(steps[:10].tolist()) == sorted(steps[10:].tolist()) == list(range(10))
    assert steps[:10].tolist() != steps[10:].tolist()
    assert order.epoch(5) == 2.0


def test_within_a_window_rows_are_neighbours():
    order = BatchOrder(rows=1000, rows_per_step=100, seed=3, window=100)
    firsts = []
    for step in range(10):
        rows = order.step_rows(step)
        assert rows.max() - rows.min() == 99
        assert rows.tolist() != sorted(rows.tolist())
        firsts.append(rows.min())
    assert firsts != sorted(firsts)
    assert window_rows(2048) * 2048 == 1 << 30


def test_validation_is_the_first_tokens_as_a_stream_for_any_number_of_ranks(tmp_path):
    tokens = write_tokens(tmp_path / "t", [[50]], val=[10, 20, 30, 5])
    stream = np.load(tmp_path / "t" / "s1.tokens.npy")

    rows = ValidationRows(tokens, sequence_len=8, max_tokens=50)

    assert len(rows) == 6
    inputs = np.concatenate([x for x, _ in in_order(rows, batch_rows=4)])
    targets = np.concatenate([y for _, y in in_order(rows, batch_rows=4)])
    assert inputs.reshape(-1).tolist() == stream[:48].tolist()
    assert targets.reshape(-1).tolist() == stream[1:49].tolist()
    split = [x for rank in range(2) for x, _ in in_order(rows, 2, rank, 2)]
    assert sorted(x[0, 0] for x in split) == sorted(inputs[::2, 0])
    assert len(ValidationRows(tokens, sequence_len=8, max_tokens=None)) == 8
    with pytest.raises(DataError, match="fewer than one row of 100"):
        ValidationRows(tokens, sequence_len=100, max_tokens=1000)


def test_folders_that_do_not_belong_together_are_refused(tmp_path):
    packed = run_pack(write_tokens(tmp_path / "a", [[40, 20]]), tmp_path / "work", sequence_len=8)
    assert len(packed) == 7
    other = write_tokens(tmp_path / "b", [[40]])
    with pytest.raises(DataError, match="indexes 60 tokens"):
        PackedRows(other, tmp_path / "work" / "out")
    np.save(other / "s0.tokens.npy", np.arange(7, dtype=np.uint32))
    with pytest.raises(DataError, match="has 7 tokens, not 40"):
        TokenSpan(other, "train")
    (other / "s0.tokens.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"s0.tokens.npy: cannot be read"):
        TokenSpan(other, "train")
