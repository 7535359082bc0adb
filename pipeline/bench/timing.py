"""How things are timed, everywhere in `bench`.

Everything compared is timed in one process, in turns: a round times each case once, and rounds are repeated, so that
whatever else the machine does falls on all cases alike. A case counts with the median of its rounds. Calls shorter than
LEAST_SECONDS are timed many at a time. A first call, which may compile and fills caches, is not counted. Devices are
waited for before the clock is read.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LEAST_SECONDS = 0.02


def seconds_of(call: Callable[[], object], device: "torch.device", times: int = 1) -> float:
    """Seconds of one call, the mean of `times` in a row."""
    from model.hardware import synchronise

    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / times


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int, device: "torch.device") -> dict[str, list[float]]:
    """Seconds a call of each case, one number a round."""
    times = {}
    for name, call in cases.items():
        call()
        times[name] = max(1, math.ceil(LEAST_SECONDS / max(seconds_of(call, device), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            seconds[name].append(seconds_of(call, device, times[name]))
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


class Ceiling:
    """The matmul rate of this device while something else is measured: sample() between its parts.

    A square matmul of random numbers, 2,048 wide on CPUs and 8,192 on GPUs, in the dtype of the work. FLOP/s.
    """

    def __init__(self, device: "torch.device", dtype: "torch.dtype", tiny: bool = False) -> None:
        import torch

        self.device = device
        self.size = 128 if tiny else 2048 if device.type == "cpu" else 8192
        self.times = 1 if device.type == "cpu" else 10
        shape = (self.size, self.size)
        self.a, self.b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        self.samples: list[float] = []
        self.multiply()

    def multiply(self) -> None:
        from model.kernels.matmul import mm

        mm(self.a, self.b)

    def sample(self) -> None:
        self.samples.append(2 * self.size**3 / seconds_of(self.multiply, self.device, self.times))

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return max(self.samples)
