"""Packed rows of tokens, and the order in which training reads them.

Everything here is a pure function of files and numbers: the rows of a step depend on the seed and the step alone, so a
resumed run needs no loader state, and the number of devices changes nothing.
"""

import json
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from data.errors import DataError

WINDOW_TOKENS = 1 << 30  # rows are shuffled within this much: 2 GB of uint16, which stays in the page cache
ROUNDS = 6  # of the Feistel network
_ORDER_BITS = 40
_LAST = (1 << _ORDER_BITS) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


# --- rows


class Rows(Protocol):
    """Rows of T + 1 tokens, ready to be trained on."""

    sequence_len: int

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens (B, T) and targets (B, T), int64, of the rows `indices` (B,); a target of -1 is not trained on."""
        ...


class TokenSpan:
    """The token files of one split as one long sequence, memory-mapped.

    Raises DataError when a file of the list is missing or not as long as tokens.json says.
    """

    def __init__(self, folder: Path, split: str):
        described = json.loads((folder / "tokens.json").read_text())
        shards = [shard for shard in described["shards"] if shard["split"] == split]
        if not shards:
            raise DataError(f"{folder / 'tokens.json'}: has no {split} shard. Name one in the data config.")
        self.bos = int(described["bos"])
        self.dtype = np.dtype(described["dtype"])
        self.names = [shard["name"] for shard in shards]
        self.parts = [open_array(folder / f"{name}.tokens.npy") for name in self.names]
        for part, shard in zip(self.parts, shards):
            if len(part) != shard["tokens"]:
                raise DataError(f"{folder / shard['name']}.tokens.npy: has {len(part)} tokens, not {shard['tokens']}")
        self.starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def copy(self, start: int, out: np.ndarray) -> None:
        """Write the tokens from `start` on to `out` (n,), across shard borders if need be."""
        shard = bisect_right(self.starts, start) - 1
        done = 0
        while done < len(out):
            part = self.parts[shard]
            at = start + done - self.starts[shard]
            n = min(len(out) - done, len(part) - at)
            out[done : done + n] = part[at : at + n]
            done += n
            shard += 1


class SpanRows:
    """Rows of T + 1 tokens that follow each other in a span, T tokens apart."""

    span: TokenSpan
    sequence_len: int
    rows: int

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Rows.gather."""
        rows = np.empty((len(indices), self.sequence_len + 1), np.int64)
        for out, i in zip(rows, indices):
            self.fill(int(i), out)
        return split_targets(rows)

    def fill(self, i: int, out: np.ndarray) -> None:
        """Write the tokens of row i to `out` (T + 1,)."""
        if not 0 <= i < self.rows:
            raise IndexError(f"row {i} of {self.rows}")
        self.span.copy(i * self.sequence_len, out)


class PackedRows(SpanRows):
    """The training rows that `pack` laid out over the files of `tokenize`; row i has T + 1 tokens.

    Raises DataError when the two folders do not belong together.
    """

    def __init__(self, tokens: Path, pack: Path):
        described = json.loads((pack / "pack.json").read_text())
        self.span = TokenSpan(tokens, "train")
        if described["source_tokens"] != len(self.span):
            raise DataError(
                f"{pack / 'pack.json'}: indexes {described['source_tokens']} tokens, but {tokens} has {len(self.span)}"
            )
        self.sequence_len = int(described["sequence_len"])
        self.rows = int(described["rows"])
        self.fitted = described["method"] == "bestfit"
        if self.fitted:
            self.first, self.starts, self.lengths = (
                open_array(pack / f"{name}.npy") for name in ("first", "starts", "lengths")
            )

    def row(self, i: int) -> np.ndarray:
        """Tokens (T + 1,) of row i, in the dtype of the token files."""
        out = np.empty(self.sequence_len + 1, self.span.dtype)
        self.fill(i, out)
        return out

    def fill(self, i: int, out: np.ndarray) -> None:
        if not (self.fitted and 0 <= i < self.rows):
            return super().fill(i, out)
        at = 0
        for piece in range(int(self.first[i]), int(self.first[i + 1])):
            n = int(self.lengths[piece])
            self.span.copy(int(self.starts[piece]), out[at : at + n])
            at += n


class ValidationRows(SpanRows):
    """The first tokens of the validation split as a plain stream, T targets per row; what bpb is measured on.

    max_tokens: the number of targets at most, rounded down to complete rows; None or more than there are: all.
    Raises DataError when there is not one complete row.
    """

    def __init__(self, tokens: Path, sequence_len: int, max_tokens: int | None = None):
        self.span = TokenSpan(tokens, "val")
        self.sequence_len = sequence_len
        available = len(self.span) - 1
        self.rows = min(available, max_tokens if max_tokens is not None else available) // sequence_len
        if self.rows < 1:
            raise DataError(
                f"{tokens}: the validation shard {self.span.names[0]} has {len(self.span)} tokens, fewer than one row "
                f"of {sequence_len} (asked for {max_tokens}). Take more validation text or a shorter context."
            )


def in_order(
    rows: Rows, batch_rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows once, in order, in batches of at most `batch_rows`; each rank gets every world_size-th batch."""
    for start in range(rank * batch_rows, len(rows), world_size * batch_rows):
        yield rows.gather(np.arange(start, min(start + batch_rows, len(rows))))


def split_targets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, T + 1) as tokens (B, T) and the tokens that follow them (B, T)."""
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def open_array(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped without pickle. Raises DataError when it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # slices of a memmap cost more
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Remove its artifact; it is made again.") from None


# --- best fit


@dataclass
class Packing:
    """Rows made of pieces, each the beginning of one document.

    documents: (S,) int64, the document of each piece; no document occurs twice.
    lengths: (S,) int32, the number of its tokens that are used.
    first: (R + 1,) int64, the first piece of each row, and the end.
    """

    documents: np.ndarray
    lengths: np.ndarray
    first: np.ndarray


def best_fit(lengths: np.ndarray, row_tokens: int, window: int = 1000) -> Packing:
    """Fill rows of exactly `row_tokens` tokens with complete documents as far as they fit, then with the start of one.

    lengths: (N,) tokens of each document, <|bos|> included, all at least 1. Each time the longest document that fits
    is taken from the next `window` unused ones; when none fits, the shortest is cropped to what is left, so that as few
    tokens as possible are lost. A document longer than a row fills one with its start. The rest at the end that does
    not fill a row is not used. O(log window) comparisons per document.
    """
    clipped = np.minimum(lengths, row_tokens).tolist()
    waiting: list[int] = []  # length << _ORDER_BITS | (_LAST - document): of equal lengths, the earlier sorts last
    documents: list[int] = []
    used: list[int] = []
    first = [0]
    upcoming = 0
    room = row_tokens
    while True:
        while upcoming < len(clipped) and len(waiting) < window:
            insort(waiting, clipped[upcoming] << _ORDER_BITS | (_LAST - upcoming))
            upcoming += 1
        if not waiting:
            break
        at = bisect_left(waiting, (room + 1) << _ORDER_BITS) - 1
        entry = waiting.pop(max(at, 0))  # -1: none fits, and the shortest is the first
        taken = min(entry >> _ORDER_BITS, room)
        documents.append(_LAST - (entry & _LAST))
        used.append(taken)
        room -= taken
        if room == 0:
            first.append(len(documents))
            room = row_tokens
    pieces = first[-1]
    return Packing(np.array(documents[:pieces], np.int64), np.array(used[:pieces], np.int32), np.array(first, np.int64))


# --- order


def window_rows(sequence_len: int) -> int:
    """Rows that WINDOW_TOKENS hold: the `window` of BatchOrder for packed text."""
    return max(1, WINDOW_TOKENS // sequence_len)


class BatchOrder:
    """The rows that each step trains on: a function of (seed, step) alone.

    Rows are visited epoch after epoch, each in an order of its own. Within an epoch, windows of `window` neighbouring
    rows are visited one after the other, in shuffled order and each shuffled, so that reads stay near each other.
    rows_per_step: rows of one optimiser step over all devices and micro-batches.
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int, window: int | None = None):
        if rows < 1 or rows_per_step < 1:
            raise DataError(f"cannot make batches of {rows_per_step} rows from {rows} rows")
        self.rows, self.rows_per_step, self.seed = rows, rows_per_step, seed
        self.window = min(window or rows, rows)

    def epoch(self, step: int) -> float:
        """Number of times that all rows have been visited before `step`."""
        return step * self.rows_per_step / self.rows

    def step_rows(self, step: int) -> np.ndarray:
        """(rows_per_step,) int64: the rows of a step."""
        return self.at(step * self.rows_per_step + np.arange(self.rows_per_step))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions (n,) of the endless sequence of epochs."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.rows)
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._in_epoch(int(epoch), within[chosen])
        return out

    def _in_epoch(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """The windows in shuffled order; a shorter one at the end of the rows comes last."""
        windows, rest = divmod(self.rows, self.window)
        place, offset = np.divmod(within, self.window)
        out = np.empty_like(within)
        window_order = Permutation(windows, self.seed, epoch)
        for p in np.unique(place):
            chosen = place == p
            complete = p < windows
            which = int(window_order(np.array([p]))[0]) if complete else windows
            inside = Permutation(self.window if complete else rest, self.seed, epoch, 1 + which)
            out[chosen] = which * self.window + inside(offset[chosen])
        return out


class Permutation:
    """A bijection of range(n), chosen by integer keys; the same on every machine and in every process.

    permutation(positions) takes an int array of any shape with values in range(n) and returns int64 of that shape. It
    needs no table: a generalised Feistel network over a rectangle with at least n places, with cycle walking back into
    range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 5).
    """

    def __init__(self, n: int, *key: int):
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        width = math.isqrt(n - 1) + 1
        self.sides = (np.uint64(width), np.uint64(-(-n // width)))  # fewer than n + sqrt(n) + 1 values in all
        state = np.zeros(1, np.uint64)
        for part in key:
            state = _mix(state + _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64))
        self.round_keys = _mix(state + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n):
            raise IndexError(f"positions must be in range({self.n})")
        values = self._shuffle(positions.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._shuffle(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64).reshape(positions.shape)

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        width = self.sides[0]
        right, left = np.divmod(values, width)
        for i, key in enumerate(self.round_keys):
            left, right = right, (left + _mix(right + key)) % self.sides[i % 2]
        return left + width * right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 on uint64 arrays (Steele, Lea, Flood 2014), without its lowest bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(16)  # leaves room for additions
