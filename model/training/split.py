"""How the rows of a step are shared out: over processes, and within one over forward passes. Standard library only, so
that a plan can say what does not divide before anything is started."""

from model.errors import ModelError


def rows_per_process(total_batch_tokens: int, sequence_len: int, processes: int) -> int:
    """Raises ModelError when a step is not the same whole number of rows for every process."""
    rows, rest = divmod(total_batch_tokens, sequence_len)
    if rest or not rows:
        near = max(1, round(total_batch_tokens / sequence_len)) * sequence_len
        raise ModelError(
            f"total_batch_tokens {total_batch_tokens} is no multiple of sequence_len {sequence_len}; the nearest that "
            f"is: {near}"
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
    """Rows of one forward pass where the user says how many of a process's `rows`: at most all of them.

    Raises ModelError when they leave a rest.
    """
    if rows % min(wanted, rows):
        raise ModelError(
            f"launch.device_batch_size={wanted} does not divide the {rows} rows of a step and process "
            f"(total_batch_tokens / sequence_len / nproc); use one of {', '.join(map(str, divisors(rows)))}, or auto"
        )
    return min(wanted, rows)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_split(total_batch_tokens: int, sequence_len: int, processes: int, device_batch_size: int | str) -> None:
    """Raises ModelError as these two do, for what a user's settings ask for."""
    rows = rows_per_process(total_batch_tokens, sequence_len, processes)
    if isinstance(device_batch_size, int):
        rows_per_pass(device_batch_size, rows)
