"""Causal attention: one function, several backends that give the same numbers."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    """Softmax attention of each query over the `window` latest positions up to its own, scaled by head_dim^-0.5.

    q: (B, T, H, D). k, v: (B, T, H_kv, D), H a multiple of H_kv. documents: (B, T) ids; a position sees its own
    document only. Returns (B, T, H, D) in q's dtype.
    """
    mask = None
    if documents is not None or window < q.size(1):
        mask = band(q.size(1), window, q.device)
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: True where the key is not after the query and less than `window` before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
