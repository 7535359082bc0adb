"""Data: encoding text and reading batches. Also the stages that prepare data for other measurements."""

import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.text.files import documents
from data.tokens.packing import BatchOrder, PackedRows, window_rows
from data.tokens.tokenizer import Tokenizer
from pipeline import typed
from pipeline.bench.registry import Bench, BenchSettings, QuietJob, Result, Skipped
from pipeline.errors import UserError
from pipeline.job import Launch, Logger
from pipeline.runner import machine
from pipeline.runner.environment import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from model.training.prefetch import Batches

SHARDS, COLUMN = "shard_*.parquet", "text"
PUBLISHED = ("fineweb-edu-100b-shuffle", "climbmix-400b-shuffle")  # preferred in a hub's folder

ENCODE_SECONDS = 3.0
ENCODE_CHARS = 4_000_000  # of text that a process encodes again and again
START_SECONDS = 300  # for a process to start

D20_TOKENS_PER_SECOND = 1.08e6  # of eight H100 [nanochat, October 2025]
RANKS, TIMES = 8, 10
BATCH_TOKENS, CONTEXT, VOCAB = 524_288, 2048, 65_536
DOCUMENT_TOKENS = 900  # on average


def find_shards(data: str) -> list[Path]:
    """The text shards of a folder, or of the data set with text in a folder laid out like a hub. Raises UserError."""
    root = user_path(data)
    if not root.is_dir():
        raise UserError("is not a directory", f"bench.data={data}")
    folders = {path.parent for path in [*root.glob(SHARDS), *root.glob(f"datasets/*/*/{SHARDS}")]}
    folder = min(folders, key=lambda path: (path.name not in PUBLISHED, path), default=None)
    if folder is None:
        raise UserError(f"has no {SHARDS}, and none in datasets/*/*", f"bench.data={data}")
    return sorted(folder.glob(SHARDS))


class Stages:
    """Runs stage modules in this process; each has a folder below `root`, and its outputs are the next one's inputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics: dict[str, dict[str, Any]] = {}

    def text(self, data: str | None) -> Path:
        """Shards to train on: those of `data`, else the text that every Python installation carries."""
        if data is not None:
            return self.link_shards(find_shards(data), None)
        return self.run("download", {"source": "data.sources.pydocs", "validation": False}, {})

    def link_shards(self, train: list[Path], val: Path | None) -> Path:
        """A folder like that of the stage download, with links to shards elsewhere."""
        folder = self.root / "text"
        folder.mkdir(parents=True)
        for path in [*train, *([val] if val else [])]:
            (folder / path.name).symlink_to(path.absolute())
        listing = {"train": [path.name for path in train], "val": val.name if val else None, "column": COLUMN}
        (folder / "shards.json").write_text(json.dumps(listing))
        return folder

    def tokenizer(self, settings: BenchSettings, text: Path) -> Path:
        tiny = {"vocab_size": 512, "max_chars": 200_000}
        return self.run("tokenizer", tiny if settings.tiny else {"vocab_size": settings.vocab_size}, {"text": text})

    def run(
        self,
        name: str,
        params: Any,
        inputs: dict[str, Path],
        launch: Launch | None = None,
        tag: str = "",
        logger: Logger | None = None,
    ) -> Path:
        """The folder that the stage has filled; params: of the module's Params, or plain values for it."""
        module = importlib.import_module(f"pipeline.stages.{name}")
        if not isinstance(params, module.Params):
            params = typed.build(module.Params, params, f"{name}.params")
        work = self.root / (f"{name}-{tag}" if tag else name)
        launch = launch or Launch(workers=machine.cores())
        job = QuietJob(name, "0" * 16, params, launch, inputs, work, self.root / "store")
        job.loggers += [logger] if logger else []
        self.metrics[work.name] = module.main(job)
        return job.out


def tokenise(bench: Bench) -> Result:
    """Encoding text: one process, two at once in turns with it, and the tokenize stage with reading and writing.

    Each process has one thread and encodes for a fixed time; their rates are added up. The tokenizer is trained on the
    same text.
    """
    if importlib.util.find_spec("rustbpe") is None:
        raise Skipped("needs rustbpe to train a tokenizer")
    settings = bench.settings
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        text = stages.text(settings.data)
        tokenizer = stages.tokenizer(settings, text)
        seconds = 0.05 if settings.tiny else ENCODE_SECONDS
        rates: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(1 if settings.tiny else max(1, settings.repeats // 2)):
            for processes, found in rates.items():
                found.append(_encode_together(processes, tokenizer, text, seconds))
        medians = {n: [statistics.median(values) for values in zip(*found)] for n, found in rates.items()}
        result: Result = {
            "1 process": {"tok_s": medians[1][0], "mb_s": medians[1][1]},
            "2 processes": {"tok_s": medians[2][0], "mb_s": medians[2][1], "times_one": medians[2][0] / medians[1][0]},
        }
        if not settings.tiny:
            stages.run("tokenize", {}, {"shards": text, "tokenizer": tokenizer})
            speed = stages.metrics["tokenize"]
            label = f"tokenize stage, {machine.cores()} workers"
            result[label] = {"tok_s": speed["tokens_per_s"], "mb_s": speed["MB_per_s"]}
    for case in result.values():
        case["vocab_size"] = 512 if settings.tiny else settings.vocab_size
    return result


def _encode_together(processes: int, tokenizer: Path, text: Path, seconds: float) -> tuple[float, float]:
    """tokens/s and MB/s of UTF-8, added up over processes that encode for `seconds` side by side."""
    context = get_context("spawn")
    barrier, rates = context.Barrier(processes), context.SimpleQueue()
    arguments = (tokenizer, text, seconds, barrier, rates)
    workers = [context.Process(target=_encode, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(START_SECONDS)
            if worker.exitcode != 0:
                raise RuntimeError(f"a process that encodes text ended with {worker.exitcode}")
        tokens, megabytes = zip(*(rates.get() for _ in workers))
        return sum(tokens), sum(megabytes)
    finally:
        for worker in workers:
            worker.kill()


def _encode(tokenizer: Path, text: Path, seconds: float, barrier: Any, rates: Any) -> None:
    """A process that encodes for `seconds` once all are ready, and puts tokens/s and MB/s into the queue."""
    encoder = Tokenizer.load(tokenizer)
    texts: list[str] = []
    for some in chain.from_iterable(documents(path, COLUMN) for path in sorted(text.glob("*.parquet"))):
        texts += some
        if sum(map(len, texts)) >= ENCODE_CHARS:
            break
    encoder.encode_batch(texts[:4])
    barrier.wait(START_SECONDS)
    tokens = size = at = 0
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        document = texts[at % len(texts)]
        tokens += 1 + len(encoder.encode(document))
        size += len(document.encode())
        at += 1
    rates.put((tokens / passed, size / passed / 1e6))


def loader(bench: Bench) -> Result:
    """Batches from packed token files, by packing method, read in the order of pretraining by model.training.prefetch's
    thread.

    rows_s: a loop that does nothing but ask for the next batch. share_of_step: the time to make a rank's part of a
    batch, in steps at ten times the rate of d20 on eight H100. waited_share: what a loop that sleeps for such a step
    then waits for the next batch.
    """
    tiny = bench.settings.tiny
    context, rows_per_step = (32, 8) if tiny else (CONTEXT, BATCH_TOKENS // CONTEXT // RANKS)
    steps, rounds = 3 if tiny else 50, range(bench.settings.repeats)
    step_tokens = rows_per_step * context
    step_seconds = step_tokens / (D20_TOKENS_PER_SECOND * TIMES / RANKS)
    result: Result = {}
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        tokens = write_tokens(Path(folder, "tokens"), 200_000 if tiny else 64_000_000)
        for method in ("stream", "bestfit"):
            params = {"method": method, "sequence_len": context}
            packed = stages.run("pack", params, {"tokens": tokens}, tag=method)
            batches = _batches(PackedRows(tokens, packed), rows_per_step)
            making = min(_seconds_waited(batches, rows_per_step, steps, 0.0) for _ in rounds)
            waited = sorted(_seconds_waited(batches, rows_per_step, steps, step_seconds) for _ in rounds)
            result[method] = {
                "rows_s": rows_per_step / making,
                "tok_s": step_tokens / making,
                "step_ms": step_seconds * 1e3,
                "share_of_step": making / step_seconds,
                "waited_share": waited[len(waited) // 2] / step_seconds,
            }
    return result


def _batches(rows: PackedRows, rows_per_step: int) -> "Batches":
    import torch

    order = BatchOrder(len(rows), rows_per_step, seed=0, window=window_rows(rows.sequence_len))

    def batch(step: int) -> "tuple[Tensor, Tensor]":
        tokens, targets = rows.gather(order.step_rows(step))
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    return batch


def _seconds_waited(batches: "Batches", rows_per_step: int, steps: int, step_seconds: float) -> float:
    """Seconds per step spent waiting for the next batch, when the step itself only sleeps for step_seconds."""
    import torch

    from model.training.prefetch import AHEAD, Prefetcher

    prefetcher = Prefetcher(batches, 0, AHEAD + steps, rows_per_step, torch.device("cpu"))
    waited = 0.0
    try:
        for _ in range(AHEAD):
            prefetcher.next()
        for _ in range(steps):
            started = time.perf_counter()
            prefetcher.next()
            waited += time.perf_counter() - started
            time.sleep(step_seconds)
        return waited / steps
    finally:
        prefetcher.close()


def write_tokens(folder: Path, count: int) -> Path:
    """A folder like that of the stage tokenize: documents of random tokens."""
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
