"""Best-fit packing of documents into full rows: what goes where, as numbers only."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_ORDER_BITS = 40
_LAST = (1 << _ORDER_BITS) - 1


@dataclass
class Packing:
    """Rows made of pieces, each the beginning of one document.

    documents: (S,) int64, which document each piece is of; no document occurs twice.
    lengths: (S,) int32, tokens of it that are used.
    first: (R + 1,) int64, the first piece of each row, and the end.
    """

    documents: np.ndarray
    lengths: np.ndarray
    first: np.ndarray


def best_fit(lengths: np.ndarray, row_tokens: int, window: int = 1000) -> Packing:
    """Fill rows of exactly `row_tokens` tokens with whole documents as far as they go, then with the start of one.

    lengths: (N,) tokens of each document, <|bos|> included, all at least 1. Each time the longest document that fits
    is taken from the next `window` unused ones; when none fits, the shortest is cropped to what is left, so that
    least is thrown away. A document longer than a row fills one with its start. What is left over at the end and
    fills no row is not used. O(log window) comparisons a document.
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
    return Packing(
        documents=np.array(documents[:pieces], np.int64),
        lengths=np.array(used[:pieces], np.int32),
        first=np.array(first, np.int64),
    )
