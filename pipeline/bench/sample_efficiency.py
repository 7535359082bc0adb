"""How well a small model predicts held-out text after few tokens: stages tokenizer, tokenize, pack and pretrain, as
they are, once a variant and seed.

By default 150 steps of 8,192 tokens, context 512, depth 4, a vocabulary of 8,192 trained on the training shards, and
bits per byte of the first 131,072 validation tokens as a plain stream in which <|bos|> precedes each document. The last
shard is validated on; `bench.split=4` holds out shard 4 and trains on all others instead, to see whether an order of
variants holds on other text.

A variant is a few overrides of the pipeline's configuration: `bench.variants=[base,modern]`, or
`'bench.variants={mine: model=modern optim=muon optim.matrix_lr=0.03}'`. What else is on the command line goes for all.
"""

import dataclasses
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.bench import configs
from pipeline.bench.configs import Config
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, BenchSettings, Skipped
from pipeline.bench.text import Stages, find_shards, list_shards
from pipeline.errors import UserError

VARIANTS = {"base": "model=base optim=muon", "modern": "model=modern optim=muon_modern"}


def measure(bench: Bench) -> Result:
    """By variant: params, and bpb by step, the mean over seeds, each of which is given beside it."""
    if bench.settings.data is None:
        raise UserError("needs text", "bench sample_efficiency", "Give bench.data=FOLDER with text shards.")
    if importlib.util.find_spec("hydra") is None:
        raise Skipped("needs hydra-core, as variants are compared by their configuration")
    chosen = {name: compose(bench, overrides) for name, overrides in variants(bench.settings).items()}
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        inputs = prepare(bench.settings, stages, next(iter(chosen.values())))
        seeds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for seed in range(bench.settings.seeds):
            for name, config in chosen.items():
                seeds[name].append(train(bench, stages, inputs, name, config, seed))
    return {name: summary(bench, config, seeds[name]) for name, config in chosen.items()}


def variants(settings: BenchSettings) -> dict[str, str]:
    """Overrides by name; a list names known variants, or gives the overrides themselves."""
    if isinstance(settings.variants, dict):
        return settings.variants
    return {name: VARIANTS.get(name, name) for name in settings.variants}


def compose(bench: Bench, overrides: str) -> Config:
    settings = bench.settings
    return configs.compose(
        bench,
        overrides,
        f"model.depth={settings.depth} model.sequence_len={settings.sequence_len} launch.log_every=10",
        f"pretrain.params.total_batch_tokens={settings.total_batch_tokens} pretrain.params.steps={settings.steps}",
        f"pretrain.params.eval_every={settings.eval_every or 'null'} pretrain.params.val_tokens={settings.val_tokens}",
        f"tokenizer.params.vocab_size={settings.vocab_size}",
    )


def prepare(settings: BenchSettings, stages: Stages, config: Config) -> dict[str, Path]:
    """What pretrain reads. Raises UserError for a split there is not."""
    shards = find_shards(str(settings.data))
    split = len(shards) - 1 if settings.split is None else settings.split
    if not 0 <= split < len(shards) or len(shards) < 2:
        raise UserError(f"is {split}, but there are {len(shards)} shards, and one has to train", "bench.split")
    train = [path for number, path in enumerate(shards) if number != split]
    text = list_shards(train, shards[split], stages.root / "text")
    tokenizer = stages.run("tokenizer", config.composed["tokenizer"]["params"], {"text": text})
    tokens = stages.run("tokenize", {}, {"shards": text, "tokenizer": tokenizer})
    packed = stages.run("pack", config.composed["pack"]["params"], {"tokens": tokens, "tokenizer": tokenizer})
    return {"tokenizer": tokenizer, "tokens": tokens, "pack": packed}


def train(
    bench: Bench, stages: Stages, inputs: dict[str, Path], name: str, config: Config, seed: int
) -> dict[str, Any]:
    params = dataclasses.replace(config.params, seed=seed)
    launch = dataclasses.replace(config.launch, save_minutes=None)
    voice = _Voice(bench, f"{name}, seed {seed}")
    out = stages.run("pretrain", params, inputs, launch, tag=str(len(stages.metrics)), logger=voice)
    return {"params": stages.metrics[out.parent.name]["params"], "bpb": voice.bpb}


class _Voice:
    """Tells and keeps the bits per byte of one training."""

    def __init__(self, bench: Bench, label: str) -> None:
        self.bench, self.label = bench, label
        self.started = time.monotonic()
        self.bpb: dict[str, float] = {}

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if "val_bpb" in metrics:
            self.bpb[str(step)] = metrics["val_bpb"]
            seconds = time.monotonic() - self.started
            self.bench.say(f"  {self.label}, step {step}: {metrics['val_bpb']:.4f} bpb ({seconds:.0f} s)")

    def summary(self, metrics: dict[str, Any]) -> None:
        pass

    def close(self, done: bool) -> None:
        pass


def summary(bench: Bench, config: Config, runs: list[dict[str, Any]]) -> dict[str, Any]:
    model = config.params.model.resolved(vocab_size=bench.settings.vocab_size)
    found: dict[str, Any] = {"params": runs[0]["params"], "matmul_params": model.matmul_params()}
    steps = runs[0]["bpb"]
    found["bpb"] = {step: statistics.mean(run["bpb"][step] for run in runs) for step in steps}
    if len(runs) > 1:
        found["seeds"] = {step: [run["bpb"][step] for run in runs] for step in steps}
    return found
