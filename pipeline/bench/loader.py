"""Batches from packed token files: how fast they come, and what of a step they cost.

The reader is that of pretraining: rows in BatchOrder's order, made ahead by model.training.prefetch's thread. `rows_s`
is one process that does nothing but ask for the next batch. `share_of_step` is the time that making a rank's part of a
batch takes, and `waited_share` what the training loop then waits for it, in steps at ten times the rate of d20 on eight
H100: a step in which nothing is done but waiting out that time.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.text import Stages

if TYPE_CHECKING:
    from data.tokens.packing import Rows
    from model.training.prefetch import Batches


D20_TOKENS_PER_SECOND = 1.08e6  # of eight H100 [nanochat, October 2025]
RANKS, TIMES = 8, 10
BATCH_TOKENS, CONTEXT, VOCAB = 524_288, 2048, 65_536
DOCUMENT_TOKENS = 900  # on average
STEPS = 50


def measure(bench: Bench) -> Result:
    """By packing method."""
    tiny = bench.settings.tiny
    context, rows = (32, 8) if tiny else (CONTEXT, BATCH_TOKENS // CONTEXT // RANKS)
    result: Result = {}
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        tokens = write_tokens(Path(folder, "tokens"), 200_000 if tiny else 64_000_000)
        stages = Stages(Path(folder))
        for method in ("stream", "bestfit"):
            params = {"method": method, "sequence_len": context}
            packed = stages.run("pack", params, {"tokens": tokens}, tag=method)
            result[method] = read(tokens, packed, rows, 3 if tiny else STEPS, bench.settings.repeats)
    return result


def read(tokens: Path, packed: Path, rows_per_step: int, steps: int, rounds: int) -> dict[str, float]:
    from data.tokens.packing import PackedRows

    rows = PackedRows(tokens, packed)
    batches = batches_of(rows, rows_per_step)
    step_tokens = rows_per_step * rows.sequence_len
    step_seconds = step_tokens / (D20_TOKENS_PER_SECOND * TIMES / RANKS)
    asked = [feed(batches, rows_per_step, steps, 0.0) for _ in range(rounds)]
    waited = [feed(batches, rows_per_step, steps, step_seconds) for _ in range(rounds)]
    making = min(asked)
    return {
        "rows_s": rows_per_step / making,
        "tok_s": step_tokens / making,
        "step_ms": step_seconds * 1e3,
        "share_of_step": making / step_seconds,
        "waited_share": sorted(waited)[len(waited) // 2] / step_seconds,
    }


def batches_of(rows: "Rows", rows_per_step: int) -> "Batches":
    import torch

    from data.tokens.packing import BatchOrder, window_rows

    order = BatchOrder(len(rows), rows_per_step, seed=0, window=window_rows(rows.sequence_len))

    def batch(step: int) -> "tuple[torch.Tensor, torch.Tensor]":
        tokens, targets = rows.gather(order.step_rows(step))
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    return batch


def feed(batches: "Batches", rows_per_step: int, steps: int, step_seconds: float) -> float:
    """Seconds a step spent waiting for the next batch, when the step itself takes step_seconds and computes nothing."""
    import torch

    from model.training.prefetch import AHEAD, Feeder

    feeder = Feeder(batches, 0, AHEAD + steps, rows_per_step, torch.device("cpu"))
    try:
        for _ in range(AHEAD):
            feeder.next()
        return _time_waits(feeder.next, steps, step_seconds) / steps
    finally:
        feeder.close()


def _time_waits(ask: Callable[[], object], steps: int, step_seconds: float) -> float:
    waited = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        ask()
        waited += time.perf_counter() - started
        time.sleep(step_seconds)
    return waited


def write_tokens(folder: Path, count: int) -> Path:
    """A folder as the stage tokenize leaves it: documents of random tokens."""
    import numpy as np

    folder.mkdir()
    random = np.random.default_rng(0)
    stream = random.integers(1, VOCAB, count, dtype=np.uint16)
    starts = np.unique(np.r_[0, random.integers(1, count, count // DOCUMENT_TOKENS)])
    stream[starts] = 0
    np.save(folder / "a.tokens.npy", stream)
    np.save(folder / "a.offsets.npy", np.r_[starts, count].astype(np.int64))
    shard = {"name": "a", "sha256": "", "split": "train", "tokens": count, "documents": len(starts)}
    described = {"dtype": "uint16", "bos": 0, "vocab_size": VOCAB, "shards": [shard]}
    (folder / "tokens.json").write_text(json.dumps(described))
    return folder
