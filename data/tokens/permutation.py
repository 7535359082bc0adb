"""A keyed permutation of range(n) that needs no table: any position can be asked for, in any order, at once.

A generalised Feistel network over a rectangle that holds n, with cycle walking back into range (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002, section 5).
"""

import math

import numpy as np

ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A bijection of range(n), chosen by integer keys; the same on every machine and in every process.

    permutation(positions) takes an int array of any shape with values in range(n) and gives int64 of that shape.
    """

    def __init__(self, n: int, *key: int):
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        width = math.isqrt(n - 1) + 1
        self.sides = (np.uint64(width), np.uint64(-(-n // width)))  # fewer than n + sqrt(n) + 1 values in all
        self.round_keys = _round_keys(key)

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
    """The finaliser of SplitMix64 on uint64 arrays (Steele, Lea, Flood 2014), less its lowest bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(16)  # leaves room to add to it


def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return _mix(state + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))
