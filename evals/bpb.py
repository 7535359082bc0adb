"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.inference_mode()
def nats_and_bytes(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor
) -> tuple[float, int]:
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
    """nats / (ln 2 * bytes); infinite without any byte."""
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf
