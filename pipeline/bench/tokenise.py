"""Encoding text: tokens/s of one process and of two at once, and of the tokenize stage with reading and writing.

One thread a process. Processes load the tokenizer and the text, meet, and then encode for a fixed time; theirs is the
sum of what each did until its own end. One and two take turns. The vocabulary is trained on the same text.
"""

import importlib.util
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, Skipped
from pipeline.bench.text import COLUMN, Stages
from pipeline.job import Launch
from pipeline.runner import machine as hardware

SECONDS = 3.0
START_SECONDS = 300  # a process that has not started by then never will
CHARS = 4_000_000  # of text that a process encodes again and again
SMALLEST = 512  # of a vocabulary that anything can be trained on


def measure(bench: Bench) -> Result:
    if importlib.util.find_spec("rustbpe") is None:
        raise Skipped("needs rustbpe to train a tokenizer")
    settings = bench.settings
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        text = stages.text(settings.data)
        vocab_size = SMALLEST if settings.tiny else settings.vocab_size
        params = {"vocab_size": vocab_size} | ({"max_chars": 200_000} if settings.tiny else {})
        tokenizer = stages.run("tokenizer", params, {"text": text})
        seconds = 0.05 if settings.tiny else SECONDS
        runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(1 if settings.tiny else max(1, settings.repeats // 2)):
            for processes, found in runs.items():
                found.append(encode_together(processes, tokenizer, text, seconds))
        result: Result = {f"{n} process{'es' if n > 1 else ''}": _median(found) for n, found in runs.items()}
        result["2 processes"]["times_one"] = result["2 processes"]["tok_s"] / result["1 process"]["tok_s"]
        if not settings.tiny:
            stages.run("tokenize", {}, {"shards": text, "tokenizer": tokenizer}, Launch(workers=hardware.cores()))
            speed = stages.metrics["tokenize"]
            result[f"tokenize stage, {hardware.cores()} workers"] = {
                "mb_s": speed["MB_per_s"],
                "tok_s": speed["tokens_per_s"],
            }
    for case in result.values():
        case["vocab_size"] = vocab_size
    return result


def encode_together(processes: int, tokenizer: Path, text: Path, seconds: float) -> dict[str, float]:
    """tokens/s and MB/s of UTF-8, added up over processes that encode for `seconds` side by side."""
    context = get_context("spawn")
    together, told = context.Barrier(processes), context.SimpleQueue()
    workers = [
        context.Process(target=_encode, args=(tokenizer, text, seconds, together, told), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(START_SECONDS)
            if worker.exitcode != 0:
                raise RuntimeError(f"a process that encodes text ended with {worker.exitcode}")
        rates = [told.get() for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
    return {"tok_s": sum(tokens for tokens, _ in rates), "mb_s": sum(size for _, size in rates) / 1e6}


def _encode(tokenizer: Path, text: Path, seconds: float, together: Any, told: Any) -> None:
    """Tells tokens and bytes a second."""
    from data.tokens.tokenizer import Tokenizer

    encoder = Tokenizer.load(tokenizer)
    texts = _some_text(text)
    encoder.encode_batch(texts[:4])
    together.wait(START_SECONDS)
    tokens = size = at = 0
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        document = texts[at % len(texts)]
        tokens += 1 + len(encoder.encode(document))
        size += len(document.encode())
        at += 1
    told.put((tokens / passed, size / passed))


def _some_text(folder: Path) -> list[str]:
    from data.text.shards import documents

    found: list[str] = []
    chars = 0
    for path in sorted(folder.glob("*.parquet")):
        for texts in documents(path, COLUMN):
            found += texts
            chars += sum(map(len, texts))
            if chars >= CHARS:
                return found
    return found


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}
