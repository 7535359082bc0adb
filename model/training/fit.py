"""How many rows go through the model at once: what the user says, or what fits."""

import torch
from torch import nn

from model.training.distributed import World
from model.training.split import divisors, rows_per_pass

CPU_TOKENS = 4096  # more only costs memory: the matrices are large enough to keep the cores busy
GPU_SHARE = 0.9  # of the free memory


def micro_batch(wanted: int | str, rows: int, sequence_len: int, model: nn.Module, world: World) -> int:
    """Rows of one forward pass, a divisor of `rows`, the same on all ranks. Raises ModelError if `wanted` is none."""
    if wanted != "auto":
        return rows_per_pass(int(wanted), rows)
    fitting = divisors(rows)
    if world.device.type != "cuda":
        return max([n for n in fitting if n * sequence_len <= CPU_TOKENS], default=1)
    with torch.random.fork_rng(devices=[world.device]):
        return world.min_host(_largest_that_fits(fitting, sequence_len, model, world.device))


def _largest_that_fits(sizes: list[int], sequence_len: int, model: nn.Module, device: torch.device) -> int:
    """Memory grows linearly with rows: two small trials give the slope, one trial of the choice confirms it."""
    one, two = (_peak_bytes(model, rows, sequence_len, device) for rows in (1, 2))
    free = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    fitting = [n for n in sizes if one + (n - 1) * max(two - one, 1) <= free]
    while len(fitting) > 1:
        try:
            _peak_bytes(model, fitting[-1], sequence_len, device)
            return fitting[-1]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fitting.pop()
    return 1


def _peak_bytes(model: nn.Module, rows: int, sequence_len: int, device: torch.device) -> int:
    """Of one forward and backward pass; leaves the gradients zero."""
    torch.cuda.reset_peak_memory_stats(device)
    tokens = torch.zeros(rows, sequence_len, dtype=torch.long, device=device)
    model.loss(tokens, tokens).backward()
    for parameter in model.parameters():
        parameter.grad.zero_()
    return torch.cuda.max_memory_allocated(device)
