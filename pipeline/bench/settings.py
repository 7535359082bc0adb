"""What `bench` is told, and what every measurement is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import typed
from pipeline.errors import UserError
from pipeline.typed import Count, CountOrOff, Natural, Positive

if TYPE_CHECKING:
    import torch


PREFIX = "bench."


@dataclass
class BenchSettings:
    """The settings written bench.NAME=VALUE on the command line."""

    out: str = "bench.json"
    device: str = "auto"  # auto | cpu | cuda | mps
    threads: Count | None = None  # null: all cores
    compile: bool | None = None  # of the training step; null: with and without on CPUs, with it on GPUs
    jobs: list[str] | None = (
        None  # training steps to measure (see pipeline/bench/configs.py); null: those of the device
    )
    repeats: Count = 5  # of every timing
    tiny: bool = False  # sizes at which nothing is measured, to see that everything runs
    data: str | None = None  # a folder laid out like a hub, or one of text shards
    vocab_size: Count = 8192  # of the tokenizer that is trained on that text
    # Of decode alone:
    models: list[str] | None = None  # null: all that this device decodes
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
    split: Natural | None = None  # number of the shard to validate on, the others are trained on; null: the last


@dataclass(frozen=True)
class Bench:
    """One invocation, as a measurement sees it.

    overrides: settings of the pipeline, as for `run`. save: keeps what is measured so far, in case the rest fails.
    """

    settings: BenchSettings
    overrides: list[str]
    device: "torch.device"
    save: Callable[[dict[str, Any]], None] = lambda result: None

    def say(self, text: str) -> None:
        print(text, flush=True)


class Skipped(Exception):
    """A measurement that this machine or this command line has no use for; the message says why."""


def parse(arguments: list[str]) -> tuple[BenchSettings, list[str]]:
    """bench.NAME=VALUE as settings, and what is left. Values are YAML. Raises UserError."""
    own = [a.removeprefix(PREFIX) for a in arguments if a.startswith(PREFIX)]
    values = {name: read_value(name, text) for name, _, text in (a.partition("=") for a in own)}
    settings = typed.build(BenchSettings, values, PREFIX.rstrip("."))
    return settings, [a for a in arguments if not a.startswith(PREFIX)]


def read_value(name: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{text!r} is no value", name) from None
