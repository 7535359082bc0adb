"""How many rows go through the model at once: what the user says, or what fits."""

import torch
from torch import nn

from model.distributed import World
from model.errors import ModelError

RESULT_NEUTRAL = "splits a batch into micro-batches; their gradients add up to the same sum"

CPU_TOKENS = 4096  # more only costs memory: the matrices are large enough to keep the cores busy
GPU_SHARE = 0.9  # of the free memory


def rows_per_rank(total_batch_tokens: int, sequence_len: int, world: World) -> int:
    """Raises ModelError when the batch is not the same whole number of rows for every rank."""
    share = sequence_len * world.size
    if total_batch_tokens < share or total_batch_tokens % share:
        near = max(1, round(total_batch_tokens / share)) * share
        raise ModelError(
            f"total_batch_tokens {total_batch_tokens} is no multiple of sequence_len {sequence_len} x {world.size} "
            f"process(es); the nearest that is: {near}"
        )
    return total_batch_tokens // share


def micro_batch(wanted: int | str, rows: int, sequence_len: int, model: nn.Module, world: World) -> int:
    """Rows of one forward pass, a divisor of `rows`, the same on all ranks. Raises ModelError if `wanted` is none."""
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if wanted != "auto":
        if wanted not in divisors:
            raise ModelError(
                f"device_batch_size {wanted} does not divide the {rows} rows of a step and process "
                f"(total_batch_tokens / sequence_len / processes); use one of {', '.join(map(str, divisors))}, or auto"
            )
        return int(wanted)
    if world.device.type != "cuda":
        return max([n for n in divisors if n * sequence_len <= CPU_TOKENS], default=1)
    with torch.random.fork_rng(devices=[world.device]):
        return world.min_host(_largest_that_fits(divisors, sequence_len, model, world.device))


def _largest_that_fits(divisors: list[int], sequence_len: int, model: nn.Module, device: torch.device) -> int:
    """Memory grows linearly with rows: two small trials give the slope, one trial of the choice confirms it."""
    one, two = (_peak_bytes(model, rows, sequence_len, device) for rows in (1, 2))
    free = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    fitting = [n for n in divisors if one + (n - 1) * max(two - one, 1) <= free]
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
