"""Whether torch.compile works on this machine: it needs a C++ compiler for CPUs, and Triton for GPUs."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def why_not(device: "torch.device") -> str | None:
    """None where it works, else the reason. Tried on a function of one line."""
    import torch
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(64, device=device))
    except (BackendCompilerFailed, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None


def forget() -> None:
    """Drop what was compiled for another model: its number per function is limited."""
    import torch

    torch._dynamo.reset()
