"""Conversations as training rows: which fit, which go together, and the reader of what `render` wrote."""

import json
from bisect import bisect_left
from enum import IntEnum
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.tokens.packing import BatchOrder, open_array, split_targets

WINDOW = 1000  # neighbouring conversations that may share a row


class Fate(IntEnum):
    """The outcome for a conversation."""

    WHOLE = 0
    CUT = 1  # its last turns do not fit
    TOO_LONG = 2  # dropped: not even its first exchange fits a row
    UNTRAINED = 3  # dropped: it has no message by the assistant
    MALFORMED = 4  # dropped: its roles do not alternate
    EMPTY = 5  # dropped: an answer in it is empty


def fit(ids: list[int], mask: list[int], row_tokens: int, turn_end: int) -> tuple[int, Fate]:
    """Number of tokens of a rendered conversation that go into a row: all, those up to the end of a turn, or none.

    turn_end: the id of <|assistant_end|>. The tokens that are kept always include one to train on.
    """
    if not any(mask):
        return 0, Fate.UNTRAINED
    if len(ids) <= row_tokens:
        return len(ids), Fate.WHOLE
    for n in range(row_tokens, 0, -1):
        if ids[n - 1] == turn_end:
            return (n, Fate.CUT) if any(mask[:n]) else (0, Fate.TOO_LONG)
    return 0, Fate.TOO_LONG


def best_fit_whole(lengths: np.ndarray, row_tokens: int, window: int = WINDOW) -> list[list[int]]:
    """The conversations of each row; none is split.

    lengths: (N,) tokens of each, at most row_tokens; those of length 0 are left out. `window` neighbouring
    conversations are packed among themselves: each row takes the longest that still fits until none does, and keeps
    them in their own order. O(log window) comparisons per conversation.
    """
    fitting = np.flatnonzero(lengths)
    rows: list[list[int]] = []
    for start in range(0, len(fitting), window):
        block = fitting[start : start + window]
        # (length, -index): of equal lengths the earlier one sorts last and is taken first.
        waiting = sorted((int(lengths[i]), -int(i)) for i in block)
        while waiting:
            row, room = [], row_tokens
            while (at := bisect_left(waiting, (room + 1,)) - 1) >= 0:
                length, negated = waiting.pop(at)
                row.append(-negated)
                room -= length
            rows.append(sorted(row))
    return rows


class ConversationRows:
    """The rows of a `render` artifact, memory-mapped. Row i has T + 1 tokens; a mask of 1 is trained on.

    Raises DataError when the folder's files do not belong together.
    """

    def __init__(self, folder: Path):
        described = json.loads((folder / "rows.json").read_text())
        self.sequence_len = int(described["sequence_len"])
        self.in_sequence = described["order"] == "sequence"
        self.tokens = open_array(folder / "rows.tokens.npy")
        self.mask = open_array(folder / "rows.mask.npy")
        shape = (described["rows"], self.sequence_len + 1)
        for name, array in (("tokens", self.tokens), ("mask", self.mask)):
            if array.shape != shape:
                raise DataError(f"{folder / f'rows.{name}.npy'}: has the shape {array.shape}, rows.json says {shape}")

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T + 1,) and mask (T + 1,) of row i."""
        return self.tokens[i], self.mask[i]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As data.tokens.packing.Rows.gather."""
        tokens, targets = split_targets(self.tokens[indices].astype(np.int64))
        targets[self.mask[indices][:, 1:] == 0] = -1
        return tokens, targets

    def order(self, rows_per_step: int, seed: int) -> BatchOrder:
        """The rows that each step trains on: shuffled anew each epoch, or as they are for a TaskSequence."""
        return (SequenceOrder if self.in_sequence else BatchOrder)(len(self), rows_per_step, seed)


class SequenceOrder(BatchOrder):
    """Rows in their own order, again and again."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions, np.int64) % self.rows
