"""Contamination check: search the training data for evaluation text, by n-grams of tokens, in one pass.

An item counts as found when at least four fifths of its n-grams are. Those that many items of a task share are its form
("Respond only with the letter ..."), and left out. A question of fewer than n tokens is looked up as a whole, from
<|user_start|> to <|user_end|>, and so only in conversations.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ENOUGH = 0.8  # of an item's n-grams
FORM = 0.01  # an n-gram that more than this part of a task's items has (and more than two) is the task's form
CHUNK_TOKENS = 1 << 20  # of the training data, looked up at once
BASE = 0x9E3779B97F4A7C15  # odd: of the polynomial that hashes are
NOTHING = np.zeros(0, np.uint64)
FILTER_BITS = (16, 27)  # least and most bits of a table that excludes most hashes in one access


def window_hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """(len - n + 1,) uint64: hashes of the windows of n of `numbers`, which are uint64 and random, one for each token.

    The polynomial sum of numbers[i + j] * BASE^(n - 1 - j) modulo 2^64, by doubling: O(log n) passes.
    """
    block, size = numbers, 1
    whole, held = numbers[:0], 0
    while True:
        if n & size:
            count = len(numbers) - held - size + 1
            whole = whole[:count] * _power(size) + block[held:] if held else block
            held += size
        if 2 * size > n:
            return whole
        block = block[:-size] * _power(size) + block[size:]
        size *= 2


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(BASE, exponent, 1 << 64))


def among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(len,) bool: True for the values that are in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values


class Lookup:
    """Finds which of its hashes (sorted, each once) occur among others."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes
        bits = int(np.clip(len(hashes).bit_length() + 4, *FILTER_BITS))
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)
        self.filter[hashes >> self.shift] = True

    def find(self, others: np.ndarray) -> np.ndarray:
        """Positions in `hashes` of those that occur in `others`."""
        likely = others[self.filter[others >> self.shift]]
        return np.searchsorted(self.hashes, np.unique(likely[among(likely, self.hashes)]))


@dataclass
class Item:
    """An item as it is looked up: hashes of windows of `length` tokens, each once; empty if it is too short."""

    length: int
    hashes: np.ndarray


@dataclass
class EvaluationText:
    """Evaluation items by task; scan() training data, then ask found().

    n: tokens of an n-gram. vocab_size: of the tokenizer that all tokens come from.
    """

    n: int
    vocab_size: int
    tasks: dict[str, list[Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = np.random.default_rng(0).integers(1 << 63, size=self.vocab_size, dtype=np.uint64)

    def add(self, task: str, items: Sequence[list[int]], around: tuple[int, int] | None) -> None:
        """items: tokens of each. around: the tokens before and after a complete one in a conversation; None if short
        items are not to be looked up."""
        made = [self._item(tokens, around) for tokens in items]
        hashes, counts = np.unique(np.concatenate([NOTHING, *(item.hashes for item in made)]), return_counts=True)
        form = hashes[counts > max(2.0, FORM * len(made))]
        for item in made:
            item.hashes = item.hashes[~among(item.hashes, form)]
        self.tasks[task] = made

    def _item(self, tokens: list[int], around: tuple[int, int] | None) -> Item:
        if len(tokens) < self.n and around is not None:
            tokens = [around[0], *tokens, around[1]]
            length = len(tokens)
        else:
            length = self.n
        if around is None and len(tokens) >= self.n + 2:
            tokens = tokens[1:-1]  # in a text, these two may be merged with a space before or a line's end after them
        if len(tokens) < length:
            return Item(length, NOTHING)
        return Item(length, np.unique(window_hashes(self.numbers[np.array(tokens)], length)))

    def lookups(self, whole_questions: bool) -> dict[int, Lookup]:
        """By length of window. whole_questions: also those of short items, which occur only in conversations."""
        by_length: dict[int, list[np.ndarray]] = {}
        for item in (item for items in self.tasks.values() for item in items):
            if len(item.hashes) and (whole_questions or item.length == self.n):
                by_length.setdefault(item.length, []).append(item.hashes)
        return {length: Lookup(np.unique(np.concatenate(hashes))) for length, hashes in by_length.items()}

    def scan(self, tokens: np.ndarray, lookups: Mapping[int, Lookup]) -> dict[int, np.ndarray]:
        """By length: the positions in the lookup's hashes of those that a stretch of training tokens has."""
        numbers = self.numbers[np.asarray(tokens, np.int64)]
        return {
            length: lookup.find(window_hashes(numbers, length))
            for length, lookup in lookups.items()
            if len(numbers) >= length
        }

    def found(self, seen: Mapping[int, np.ndarray]) -> dict[str, list[int]]:
        """Item numbers by task. seen: the hashes by length that the training data have, sorted."""
        return {
            task: [number for number, item in enumerate(items) if self._is_found(item, seen)]
            for task, items in self.tasks.items()
        }

    def _is_found(self, item: Item, seen: Mapping[int, np.ndarray]) -> bool:
        there = among(item.hashes, seen.get(item.length, NOTHING))
        return bool(there.any() and there.sum() >= ENOUGH * len(item.hashes))

    def checked(self, task: str) -> int:
        """Number of items of a task that are not too short to look up."""
        return sum(len(item.hashes) > 0 for item in self.tasks[task])


def chunks(parts: Iterable[np.ndarray], longest: int) -> Iterator[np.ndarray]:
    """Stretches of each array, overlapping so that no window of `longest` tokens is missed."""
    for part in parts:
        for start in range(0, max(1, len(part) - longest + 1), CHUNK_TOKENS):
            yield part[start : start + CHUNK_TOKENS + longest - 1]
