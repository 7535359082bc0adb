"""Prediction of held-out text after training on few tokens, by the stages tokenizer, tokenize, pack and pretrain.

By default 150 steps of 8,192 tokens, context 512, depth 4, a vocabulary of 8,192 trained on the training shards, and
bits per byte of the first 131,072 validation tokens as a plain stream in which <|bos|> precedes each document. The last
shard is validated on. `bench.split=4` validates on shard 4 and trains on all others instead, to see whether an order of
variants holds on other text.

A variant is a few overrides of the pipeline's configuration: `bench.variants=[base,modern]`, or
`'bench.variants={mine: model=modern optim=muon optim.matrix_lr=0.03}'`. Other overrides on the command line apply to
all of them.
"""

import dataclasses
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.bench import jobs
from pipeline.bench.data import Stages, find_shards
from pipeline.bench.jobs import Config
from pipeline.bench.registry import Bench, BenchSettings, Result, Skipped
from pipeline.errors import UserError

VARIANTS = {"base": "model=base optim=muon", "modern": "model=modern optim=muon_modern"}


def sample_efficiency(bench: Bench) -> Result:
    """By variant: params, and bpb by step, the mean over seeds; the values of each seed beside it."""
    settings = bench.settings
    if settings.data is None:
        raise UserError("needs text", "bench sample_efficiency", "Give bench.data=FOLDER with text shards.")
    if importlib.util.find_spec("hydra") is None:
        raise Skipped("needs hydra-core, because variants are groups of the configuration")
    variants = settings.variants
    if isinstance(variants, list):  # of known names, or of overrides
        variants = {name: VARIANTS.get(name, name) for name in variants}
    chosen = {name: _compose(bench, overrides) for name, overrides in variants.items()}
    runs: dict[str, list[Progress]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        inputs = _prepare(settings, stages, next(iter(chosen.values())))
        for seed in range(settings.seeds):
            for number, (name, config) in enumerate(chosen.items()):
                params = dataclasses.replace(config.params, seed=seed)
                runs[name].append(progress := Progress(bench, f"{name}, seed {seed}"))
                stages.run("pretrain", params, inputs, config.launch, f"{number}-{seed}", progress)
                progress.params = stages.metrics[f"pretrain-{number}-{seed}"]["params"]
    result: Result = {}
    for name, config in chosen.items():
        model = config.params.model.resolved(vocab_size=settings.vocab_size)
        result[name] = {"params": runs[name][0].params, "matmul_params": model.matmul_params()}
        by_seed = {step: [run.bpb[step] for run in runs[name]] for step in runs[name][0].bpb}
        result[name]["bpb"] = {step: statistics.mean(values) for step, values in by_seed.items()}
        if settings.seeds > 1:
            result[name]["seeds"] = by_seed
    return result


def _compose(bench: Bench, overrides: str) -> Config:
    settings = bench.settings
    config = jobs.compose(
        bench,
        overrides,
        f"model.depth={settings.depth} model.sequence_len={settings.sequence_len} launch.log_every=10",
        f"pretrain.params.total_batch_tokens={settings.total_batch_tokens} pretrain.params.steps={settings.steps}",
        f"pretrain.params.eval_every={settings.eval_every or 'null'} pretrain.params.val_tokens={settings.val_tokens}",
        f"tokenizer.params.vocab_size={settings.vocab_size}",
    )
    config.launch.save_minutes = None
    return config


def _prepare(settings: BenchSettings, stages: Stages, config: Config) -> dict[str, Path]:
    """The inputs of pretrain. Raises UserError for a split that does not exist."""
    shards = find_shards(str(settings.data))
    split = len(shards) - 1 if settings.split is None else settings.split
    if not 0 <= split < len(shards) or len(shards) < 2:
        raise UserError(f"is {split}, but there are {len(shards)} shards, and one has to train", "bench.split")
    text = stages.link_shards([path for number, path in enumerate(shards) if number != split], shards[split])
    tokenizer = stages.run("tokenizer", config.composed["tokenizer"]["params"], {"text": text})
    tokens = stages.run("tokenize", {}, {"shards": text, "tokenizer": tokenizer})
    packed = stages.run("pack", config.composed["pack"]["params"], {"tokens": tokens, "tokenizer": tokenizer})
    return {"tokenizer": tokenizer, "tokens": tokens, "pack": packed}


class Progress:
    """A logger that prints and keeps the bits per byte of one training."""

    def __init__(self, bench: Bench, label: str) -> None:
        self.bench, self.label, self.started = bench, label, time.monotonic()
        self.params = 0
        self.bpb: dict[str, float] = {}

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if "val_bpb" in metrics:
            self.bpb[str(step)] = metrics["val_bpb"]
            seconds = time.monotonic() - self.started
            self.bench.say(f"  {self.label}, step {step}: {metrics['val_bpb']:.4f} bpb ({seconds:.0f} s)")

    def summary(self, metrics: dict[str, Any]) -> None: ...

    def close(self, done: bool) -> None: ...
