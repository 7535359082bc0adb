"""The random number generators of a process as tensors, so that a resumed run draws what it would have drawn."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int, rank: int) -> None:
    """Ranks draw different numbers (dropout), each the same ones in every run."""
    mixed = np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
    random.seed(int(mixed))
    np.random.seed(int(mixed & np.uint64(0xFFFFFFFF)))


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    version, numbers, _ = random.getstate()
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "rng.python": torch.tensor([version, *numbers], dtype=torch.int64),
        "rng.numpy": torch.from_numpy(keys.astype(np.int64)),
        "rng.numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """The device's own generator is restored when it is of the kind that was saved."""
    version, *numbers = state["rng.python"].tolist()
    random.setstate((version, tuple(numbers), None))
    position, has_gauss, gauss = state["rng.numpy_rest"].tolist()
    keys = state["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["rng.torch"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
