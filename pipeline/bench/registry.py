"""What there is to measure. Each is a function of a bench that returns {case: {quantity: value}}; names carry units."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pipeline.bench import table
from pipeline.bench.settings import Bench
from pipeline.typed import unknown

Result = dict[str, dict[str, Any]]

MEASUREMENTS = {  # name: module of pipeline.bench, :function if not `measure`; in the order of `bench` without names
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
    "gpu": "gpu",
    "equal_steps": "equality:steps",
    "equal_compiled": "equality:compiled",
    "equal_fp8": "equality:eight_bits",
    "equal_attention": "equality_of_kernels:attention",
    "equal_graphs": "equality_of_kernels:graphs",
}
NAMED_ONLY = tuple(MEASUREMENTS)[list(MEASUREMENTS).index("sample_efficiency") :]  # take an hour, or consist of others


def choose(names: list[str]) -> list[str]:
    """The measurements that names stand for; all of the quick ones without names. Raises UserError."""
    for name in names:
        if name not in MEASUREMENTS:
            raise unknown(name, list(MEASUREMENTS), "bench")
    return names or [name for name in MEASUREMENTS if name not in NAMED_ONLY]


def find(name: str) -> Callable[[Bench], Result]:
    function = MEASUREMENTS[name].partition(":")[2] or "measure"
    measure: Callable[[Bench], Result] = getattr(_module_of(name), function)
    return measure


def check(name: str, bench: Bench) -> None:
    """Let a measurement refuse before anything is measured. Raises UserError."""
    getattr(_module_of(name), "check", lambda bench: None)(bench)


def lines(name: str, result: Result) -> list[str]:
    """The result as text: the measurement's own table, where it has one."""
    show: Callable[[Result], list[str]] = getattr(_module_of(name), "lines", table.lines)
    return show(result)


def _module_of(name: str) -> ModuleType:
    return importlib.import_module(f"pipeline.bench.{MEASUREMENTS[name].partition(':')[0]}")
