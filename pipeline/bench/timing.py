"""How everything in `bench` is timed.

Cases that are compared run in one process, in turns: a round times each case once, and rounds are repeated, so that
other load on the machine affects all cases alike. The median over rounds counts. Calls shorter than LEAST_SECONDS are
timed several at a time. The first call, which may compile and fills caches, is not counted. The device is synchronised
before the clock is read.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from model.device import synchronise
from pipeline.bench.registry import Bench

LEAST_SECONDS = 0.02

Cases = Mapping[str, Callable[[], object]]


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds per call, the mean of `times` in a row."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / times


def in_turns(bench: Bench, cases: Cases) -> dict[str, list[float]]:
    """Seconds per call of each case, one number for each of bench.repeats rounds."""
    times = {}
    for name, call in cases.items():
        call()
        times[name] = max(1, math.ceil(LEAST_SECONDS / max(seconds_of(call, bench.device), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(bench.settings.repeats):
        for name, call in cases.items():
            seconds[name].append(seconds_of(call, bench.device, times[name]))
    return seconds


def median_seconds(bench: Bench, cases: Cases) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in in_turns(bench, cases).items()}
