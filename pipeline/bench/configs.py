"""Training jobs to measure: overrides of the pipeline's own configuration, so that what is measured is what trains."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from pipeline import typed
from pipeline.bench.settings import Bench, read_value
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.stages import pretrain

JOBS = {
    "tiny": "model.depth=2 model.width=32 model.head_dim=16 model.vocab_size=512 model.sequence_len=32 "
    "pretrain.params.total_batch_tokens=64",
    "small": "model.depth=4 model.vocab_size=1024 model.sequence_len=256 pretrain.params.total_batch_tokens=1024",
    "d4": "model.depth=4 model.vocab_size=8192 model.sequence_len=512 pretrain.params.total_batch_tokens=8192",
    "d12": "model.depth=12 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=524288",
    "d20": "model.depth=20 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=524288",
    "d32": "model.depth=32 model.vocab_size=65536 model.sequence_len=2048 pretrain.params.total_batch_tokens=16384 "
    "launch.device_batch_size=8",
}
# What `model=modern optim=muon_modern` changes in the cost of a step, spelled out because Hydra may be missing here.
MODERN = "model=modern optim.normuon=true optim.cautious=true"
BY_DEVICE = {"cpu": ["d4"], "mps": ["d4"], "cuda": ["d12", "d20"]}


@dataclass(frozen=True)
class Config:
    """pretrain's params and launch; `composed` is the whole of the configuration where Hydra composed it."""

    params: pretrain.Params
    launch: Launch
    composed: dict[str, Any]


def names(bench: Bench) -> list[str]:
    """The jobs to measure. Raises UserError for one there is not."""
    if bench.settings.tiny:
        return ["tiny"]
    chosen = bench.settings.jobs or BY_DEVICE[bench.device.type]
    for name in chosen:
        if name not in JOBS:
            raise typed.unknown(name, list(JOBS), "bench.jobs")
    return chosen


def compose(bench: Bench, *overrides: str) -> Config:
    """What `run` would make of these overrides and the command line's, which come last. Raises UserError."""
    words = [word for text in overrides for word in text.split()] + bench.overrides
    own = {"device": bench.device.type, "threads": bench.settings.threads, "nproc": 1}
    if importlib.util.find_spec("hydra") is None:
        plain = read_plainly(words)
        return Config(params_of(plain["params"]), typed.build(Launch, plain["launch"] | own, "launch"), {})
    from pipeline.config import compose as config

    composed = config.compose(["recipe=d20", *words])
    settings = config.settings(composed)
    stage = settings.stages["pretrain"]
    launch = dataclasses.asdict(settings.launch) | stage.launch | own
    return Config(params_of(stage.params), typed.build(Launch, launch, "launch"), composed)


def params_of(values: dict[str, Any]) -> pretrain.Params:
    return typed.build(pretrain.Params, values, "pretrain.params")


def read_plainly(words: list[str]) -> dict[str, dict[str, Any]]:
    """{"params": pretrain's, "launch": ...} where there is no Hydra: no groups but model, and what is not set is left
    to the defaults of the dataclasses. Raises UserError."""
    found: dict[str, dict[str, Any]] = {"params": {"model": {}, "optim": {}}, "launch": {}}
    for word in words:
        name, _, text = word.partition("=")
        path = name.removeprefix("pretrain.").split(".")
        if path == ["model"]:
            path = ["model", "arch"]
        if path[0] in ("model", "optim"):
            path = ["params", *path]
        if path[0] not in found or len(path) < 2:
            raise UserError(f"{word}: only model.*, optim.*, launch.* and pretrain.params.* work without hydra-core")
        level: dict[str, Any] = found
        for key in path[:-1]:
            level = level.setdefault(key, {})
        level[path[-1]] = read_value(name, text)
    return found
