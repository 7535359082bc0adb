"""The rows of a step, split over processes, and those of a forward pass: as many as the user says, or as fit.

Nothing imports torch until it is used, so that a plan can say what does not divide before anything is started.
"""

from typing import TYPE_CHECKING

from model.errors import ModelError

if TYPE_CHECKING:
    import torch

    from model.distributed import World
    from model.gpt import GPT

CPU_TOKENS = 4096  # of one pass; more only costs memory, as these matrices keep the cores busy
GPU_SHARE = 0.9  # of the free memory


def rows_per_process(total_batch_tokens: int, sequence_len: int, processes: int) -> int:
    """Raises ModelError when a step is not the same whole number of rows for every process."""
    rows, rest = divmod(total_batch_tokens, sequence_len)
    if rest or not rows:
        near = max(1, round(total_batch_tokens / sequence_len)) * sequence_len
        raise ModelError(
            f"total_batch_tokens {total_batch_tokens} is not a multiple of sequence_len {sequence_len}; the nearest "
            f"that is: {near}"
        )
    if rows % processes:
        below = max(n for n in divisors(rows) if n < processes)
        above = [n for n in divisors(rows) if n > processes][:1]
        raise ModelError(
            f"launch.nproc={processes} processes cannot share the {rows} rows of a step evenly (total_batch_tokens "
            f"{total_batch_tokens} / sequence_len {sequence_len}); use {' or '.join(map(str, [below, *above]))}"
        )
    return rows // processes


def rows_per_pass(wanted: int, rows: int) -> int:
    """Rows of one forward pass, as the user wants but at most a process's `rows`. Raises ModelError for a remainder."""
    if rows % min(wanted, rows):
        raise ModelError(
            f"launch.device_batch_size={wanted} does not divide the {rows} rows of a step and process "
            f"(total_batch_tokens / sequence_len / nproc); use one of {', '.join(map(str, divisors(rows)))}, or auto"
        )
    return min(wanted, rows)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_split(total_batch_tokens: int, sequence_len: int, processes: int, device_batch_size: int | str) -> None:
    """Raises ModelError for settings that the two functions above would refuse."""
    rows = rows_per_process(total_batch_tokens, sequence_len, processes)
    if isinstance(device_batch_size, int):
        rows_per_pass(device_batch_size, rows)


def micro_batch(wanted: int | str, rows: int, sequence_len: int, model: "GPT", world: "World") -> int:
    """Rows of one forward pass: a divisor of `rows`, the same on all ranks. Raises ModelError if `wanted` is none."""
    if wanted != "auto":
        return rows_per_pass(int(wanted), rows)
    fitting = divisors(rows)
    if world.device.type != "cuda":
        return max([n for n in fitting if n * sequence_len <= CPU_TOKENS], default=1)
    with torch.random.fork_rng(devices=[world.device]):
        return world.min_host(_largest_that_fits(fitting, sequence_len, model, world.device))


def _largest_that_fits(sizes: list[int], sequence_len: int, model: "GPT", device: "torch.device") -> int:
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


def _peak_bytes(model: "GPT", rows: int, sequence_len: int, device: "torch.device") -> int:
    """Peak memory of one forward and backward pass; leaves the gradients zero."""
    torch.cuda.reset_peak_memory_stats(device)
    tokens = torch.zeros(rows, sequence_len, dtype=torch.long, device=device)
    model.loss(tokens, tokens).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return torch.cuda.max_memory_allocated(device)
