"""Drawing generated problems: the same on every machine, and never the same in training and evaluation."""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def keyed(text: str) -> int:
    """64 bits that `text` decides; stable across Python versions and processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(problem: str, fraction: float = 0.1) -> bool:
    """Whether a problem is for evaluation only.

    The problem itself decides, not who draws it: training and evaluation cannot meet, whatever their seeds and sizes.
    """
    return keyed(f"held out: {problem}") < fraction * 2**64


class Draw:
    """Random choices named by a text. Built on `random.random`, which Python promises to keep as it is."""

    def __init__(self, name: str):
        self._random = random.Random(keyed(name)).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """One of the options, each as likely as its weight is large."""
        point = self._random() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            point -= weight
            if point < 0:
                return option
        return options[-1]

    def order(self, n: int) -> list[int]:
        """range(n), shuffled."""
        keys = [self._random() for _ in range(n)]
        return sorted(range(n), key=keys.__getitem__)
