"""What `bench` can measure, its settings, and what each measurement is passed.

A measurement is a function of a Bench that returns {case: {quantity: value}}. The names of quantities carry units.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from model.checks import Count, CountOrOff, Natural, Positive
from pipeline import typed
from pipeline.errors import UserError
from pipeline.job import Job

if TYPE_CHECKING:
    import torch

Result = dict[str, dict[str, Any]]
T = TypeVar("T")

MEASUREMENTS = {  # name: module of pipeline.bench and function, in the order of `bench` without names
    "matmul": "kernels.matmul",
    "memory": "kernels.memory",
    "attention": "kernels.attention",
    "cross_entropy": "kernels.cross_entropy",
    "optimiser": "training.optimiser",
    "train_step": "training.train_step",
    "fit": "training.fit",
    "checkpoint": "training.checkpoint",
    "tokenise": "data.tokenise",
    "loader": "data.loader",
    "decode": "decoding.decode",
    "rollouts": "decoding.rollouts",
    "core": "core.core",
    "sample_efficiency": "sample_efficiency.sample_efficiency",
    "gpu": "gpu.gpu",
    "equal_steps": "equality.steps",
    "equal_compiled": "equality.compiled",
    "equal_fp8": "equality.eight_bits",
    "equal_attention": "equality.attention",
    "equal_graphs": "equality.graphs",
}
NAMED_ONLY = tuple(MEASUREMENTS)[list(MEASUREMENTS).index("sample_efficiency") :]  # take an hour, or consist of others

PREFIX = "bench."


@dataclass
class BenchSettings:
    """The settings written bench.NAME=VALUE on the command line."""

    out: str = "bench.json"
    device: str = "auto"  # auto | cpu | cuda | mps
    threads: Count | None = None  # null: all cores
    compile: bool | None = None  # of the training step; null: with and without on CPUs, with it on GPUs
    jobs: list[str] | None = None  # training steps to measure (see pipeline/bench/jobs.py); null: the device's own
    repeats: Count = 5  # of every timing
    tiny: bool = False  # a trial of the code with the smallest sizes; its numbers mean nothing
    data: str | None = None  # a folder laid out like a hub, or one of text shards
    vocab_size: Count = 8192  # of the tokenizer that is trained on that text
    # Of decode alone:
    models: list[str] | None = None  # null: all models that are measured on this device
    batches: list[Count] | None = None  # rows side by side; null: those of the model
    # Of gpu alone:
    budget_seconds: Positive = 520.0  # of all parts together; with the start of the command nine minutes
    parts: list[str] | None = None  # null: all; see pipeline/bench/gpu.py
    # Of core alone:
    bundle: str | None = None  # the folder of CORE's bundle, or its zip
    items: Count = 16  # of each task
    # Of sample_efficiency alone:
    variants: list[str] | dict[str, str] = field(default_factory=lambda: ["base", "modern"])
    seeds: Count = 1
    depth: Count = 4
    sequence_len: Count = 512
    steps: Count = 150
    total_batch_tokens: Count = 8192
    eval_every: CountOrOff = 50  # steps
    val_tokens: Count = 131_072
    split: Natural | None = None  # index of the shard to validate on, the others are trained on; null: the last


@dataclass
class Bench:
    """One invocation, as a measurement sees it.

    overrides: settings of the pipeline, as for `run`. save: keeps what is measured so far, in case the rest fails.
    """

    settings: BenchSettings
    overrides: list[str]
    device: "torch.device"
    save: Callable[[Result], None] = lambda result: None

    def say(self, text: str) -> None:
        print(text, flush=True)

    def choose(self, tiny: T, cpu: T, cuda: T) -> T:
        """Return the sizes to measure: those for bench.tiny, else those for the kind of device."""
        return tiny if self.settings.tiny else cuda if self.device.type == "cuda" else cpu


class QuietJob(Job[Any]):
    """A job of a stage that runs within a measurement."""

    def say(self, text: str) -> None:
        """Messages of stages would only interrupt the results."""


class Skipped(Exception):
    """A measurement that does not apply to this machine or command line; the message says why."""


def parse(arguments: list[str]) -> tuple[BenchSettings, list[str]]:
    """Return bench.NAME=VALUE as settings, and the other arguments. Values are YAML. Raises UserError."""
    own = [a.removeprefix(PREFIX).partition("=") for a in arguments if a.startswith(PREFIX)]
    settings = typed.build(BenchSettings, {name: read_value(name, text) for name, _, text in own}, PREFIX.rstrip("."))
    return settings, [a for a in arguments if not a.startswith(PREFIX)]


def read_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not a value", name) from None


def choose(names: list[str]) -> list[str]:
    """Return the measurements to run: those named, or all quick ones. Raises UserError for an unknown name."""
    check_names(names, MEASUREMENTS, "bench")
    return names or [name for name in MEASUREMENTS if name not in NAMED_ONLY]


def check_names(names: list[str], known: dict[str, Any], where: str) -> None:
    """Raises UserError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise typed.unknown(name, list(known), where)


def find(name: str) -> Callable[[Bench], Result]:
    module, _, function = MEASUREMENTS[name].partition(".")
    return getattr(importlib.import_module(f"pipeline.bench.{module}"), function)
