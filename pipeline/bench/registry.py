"""What there is to measure. Each module has `measure(bench) -> {case: {quantity: value}}`; names carry their units."""

import importlib
from collections.abc import Callable
from typing import Any

from pipeline.bench.settings import Bench
from pipeline.typed import unknown

RESULT_NEUTRAL = "measures; makes nothing"

Result = dict[str, dict[str, Any]]

MEASUREMENTS = {  # name: module of pipeline.bench; in the order of `bench` without names
    "matmul": "matmul",
    "memory": "memory",
    "attention": "attention",
    "cross_entropy": "cross_entropy",
    "optimiser": "optimiser",
    "train_step": "train_step",
    "fit": "fit",
    "checkpoint": "checkpoint",
    "tokenise": "tokenise",
    "loader": "loader",
    "decode": "decode",
    "rollouts": "rollouts",
    "core": "core",
    "sample_efficiency": "sample_efficiency",
}
NAMED_ONLY = ("sample_efficiency",)  # takes an hour rather than minutes


def choose(names: list[str]) -> list[str]:
    """The measurements that names stand for; all of the quick ones without names. Raises UserError."""
    for name in names:
        if name not in MEASUREMENTS:
            raise unknown(name, list(MEASUREMENTS), "bench")
    return names or [name for name in MEASUREMENTS if name not in NAMED_ONLY]


def find(name: str) -> Callable[[Bench], Result]:
    module = importlib.import_module(f"pipeline.bench.{MEASUREMENTS[name]}")
    measure: Callable[[Bench], Result] = module.measure
    return measure
