"""Bits per byte, and accuracy with its confidence interval."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.gpt import GPT

Z95 = 1.959964  # of a two-sided interval of 95%


@torch.inference_mode()
def nats_and_bytes(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> tuple[float, int]:
    """Sums over all batches: nats of the targets that stand for text, and the UTF-8 bytes these targets stand for.

    batches: tokens and targets, both (B, T) int64; a target of -1 does not count. token_bytes: (vocab,) integers, 0 for
    special tokens, which do not count either. All on the model's device.
    """
    nats, total_bytes = 0.0, 0
    for tokens, targets in batches:
        lengths = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats += float(model.loss(tokens, torch.where(lengths > 0, targets, -1)))
        total_bytes += int(lengths.sum())
    return nats, total_bytes


def bits_per_byte(nats: float, total_bytes: int) -> float:
    """nats / (ln 2 * bytes), which does not depend on the tokenizer; infinite without any byte."""
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf


def wilson(accuracy: float, trials: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson, 1927)."""
    if trials == 0:
        return 0.0, 1.0
    shrink = 1 + Z95**2 / trials
    centre = (accuracy + Z95**2 / (2 * trials)) / shrink
    half = Z95 / shrink * math.sqrt(accuracy * (1 - accuracy) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(correct: float, items: int, baseline: float) -> dict[str, Any]:
    """Accuracy, centred accuracy and confidence interval of `correct` right answers among `items`."""
    accuracy = correct / items
    return {
        "accuracy": accuracy,
        "correct": correct,
        "items": items,
        "baseline": baseline,
        "centered": (accuracy - baseline) / (1 - baseline),
        "ci": list(wilson(accuracy, items)),
    }
