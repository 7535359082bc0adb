"""Packing whole conversations, and reading the rows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat.rows import ConversationRows, Fate, best_fit_whole, fit
from data.errors import DataError


@given(st.lists(st.integers(0, 50), max_size=200), st.integers(1, 60))
def test_every_conversation_is_whole_in_one_row(lengths, window):
    rows = best_fit_whole(np.array(lengths, int), row_tokens=50, window=window)
    assert sorted(i for row in rows for i in row) == [i for i, n in enumerate(lengths) if n]
    assert all(0 < sum(lengths[i] for i in row) <= 50 for row in rows)
    assert all(row == sorted(row) for row in rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_rows_are_filled_as_far_as_the_window_allows(lengths):
    """No conversation of a row would have fitted into an earlier row of its window."""
    rows = best_fit_whole(np.array(lengths), row_tokens=50)
    for r, row in enumerate(rows):
        room = 50 - sum(lengths[i] for i in row)
        assert all(lengths[i] > room for later in rows[r + 1 :] for i in later)


def test_longest_first_within_a_window_that_does_not_reach_further():
    lengths = np.array([10, 40, 20, 30, 50, 1])
    assert best_fit_whole(lengths, 50) == [[4], [0, 1], [2, 3], [5]]
    assert best_fit_whole(lengths, 50, window=2) == [[0, 1], [2, 3], [4], [5]]


END = 7


@pytest.mark.parametrize(
    ("ids", "mask", "row_tokens", "expected"),
    [
        ([1, 2, 3, END], [0, 0, 1, 1], 4, (4, Fate.WHOLE)),
        ([1, 2, 3, END, 2, 3, END], [0, 0, 1, 1, 0, 1, 1], 6, (4, Fate.CUT)),
        ([1, 2, 3, END, 2, 3, END], [0, 0, 1, 1, 0, 1, 1], 4, (4, Fate.CUT)),
        ([1, 2, 3, END], [0, 0, 1, 1], 3, (0, Fate.TOO_LONG)),
        ([1, 2, 3, END, 2, 3, END], [0, 0, 0, 0, 0, 1, 1], 6, (0, Fate.TOO_LONG)),  # the first answer has no weight
        ([1, 2, 2], [0, 0, 0], 3, (0, Fate.UNTRAINED)),
        ([1, 2, 2, 2], [0, 0, 0, 0], 3, (0, Fate.UNTRAINED)),
    ],
)
def test_what_does_not_fit_ends_with_a_turn_or_is_dropped(ids, mask, row_tokens, expected):
    assert fit(ids, mask, row_tokens, END) == expected


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "rows.tokens.npy", np.arange(30, dtype=np.uint16).reshape(6, 5))
    np.save(tmp_path / "rows.mask.npy", np.tile(np.array([0, 1, 0, 1, 1], np.uint8), (6, 1)))
    (tmp_path / "rows.json").write_text(json.dumps({"sequence_len": 4, "rows": 6, "order": "mixture"}))
    return tmp_path


def test_a_batch_predicts_the_next_token_where_the_mask_says_so(folder):
    tokens, targets = ConversationRows(folder).gather(np.array([1, 0]))
    assert tokens.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]]
    assert targets.tolist() == [[6, -1, 8, 9], [1, -1, 3, 4]]


def test_each_epoch_has_all_rows_in_an_order_of_its_own(folder):
    order = ConversationRows(folder).order(rows_per_step=3, seed=5)
    first, second = (np.concatenate([order.step_rows(s), order.step_rows(s + 1)]).tolist() for s in (0, 2))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_files_that_do_not_belong_together_are_an_error(folder):
    np.save(folder / "rows.mask.npy", np.zeros((6, 4), np.uint8))
    with pytest.raises(DataError, match=r"rows\.mask\.npy: has the shape"):
        ConversationRows(folder)
    (folder / "rows.tokens.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        ConversationRows(folder)
