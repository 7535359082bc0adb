"""Compute dtype, and the loss scale that float16 needs."""

import torch

from model.errors import ModelError


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on GPUs that have it, float16 on older ones, else float32. Raises ModelError for unknown names."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in ("bfloat16", "float32", "float16"):
        raise ModelError(f"dtype {name!r} is not one of auto, bfloat16, float32, float16")
    return getattr(torch, name)


class LossScale:
    """Dynamic scale of the summed loss in float16: halved after a step whose gradients overflow, doubled after
    `patience` good ones. In other dtypes it stays 1."""

    patience = 2000

    def __init__(self, dtype: torch.dtype) -> None:
        self.active = dtype == torch.float16
        self.value = 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps % self.patience == 0:
            self.value *= 2
