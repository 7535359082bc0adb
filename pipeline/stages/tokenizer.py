"""tokenizer: a byte-level BPE vocabulary from the first text shards, and how well it does on text it has not seen."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.job import Job, Stopped

HELD_OUT_EVERY = 50  # documents


@dataclass
class Params:
    vocab_size: int = 65536  # the special tokens included
    max_chars: int = 2_000_000_000  # of text to train on
    doc_cap: int = 10_000  # characters of one document; a longer one gives its start
    eval_chars: int = 1_000_000  # of held-out text to measure on


def check(params: Params, upstream: dict[str, Any]) -> None:
    """Raises DataMistake for a vocabulary that cannot hold bytes and special tokens."""
    if params.vocab_size < 512:  # importing what knows the exact number takes longer than a plan should
        from data import bpe

        bpe.check_vocab_size(params.vocab_size)


def main(job: Job[Params]) -> dict[str, Any]:
    from data import bpe
    from data.errors import DataError

    params = job.params
    bpe.check_vocab_size(params.vocab_size)
    corpus = _Corpus(job)
    started = time.monotonic()
    ranks = bpe.train(corpus.training_texts(), params.vocab_size)
    seconds = time.monotonic() - started
    if not corpus.held_out:
        raise DataError(f"{job.inputs['text']}: has no document to measure the tokenizer on. Give more text.")
    tokenizer = bpe.save(ranks, job.out)
    measured = _bytes_per_token(tokenizer.encode, corpus.held_out)
    evaluation = {
        "held_out": {"documents": len(corpus.held_out), "bytes": sum(len(t.encode()) for t in corpus.held_out)},
        "bytes_per_token": {"this": measured, **_compare(corpus.held_out)},
    }
    (job.out / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    job.say(f"{tokenizer.vocab_size:,} tokens; {measured:.3f} bytes a token on held-out text")
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": measured,
        "train_chars": corpus.chars,
        "train_seconds": seconds,
    }


@dataclass
class _Corpus:
    """The documents of the shards, streamed; of the first ones, every HELD_OUT_EVERY-th is kept back to measure on."""

    job: Job[Params]
    chars: int = 0
    held_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from data.shards import text_bytes

        listing = json.loads((self.job.inputs["text"] / "shards.json").read_text())
        self.column = listing["column"]
        self.shards = [self.job.inputs["text"] / name for name in listing["train"]]
        self.about_chars = min(sum(text_bytes(path, self.column) for path in self.shards), self.job.params.max_chars)

    def training_texts(self) -> Iterator[str]:
        params, held_chars = self.job.params, 0
        for i, text in enumerate(self._texts()):
            text = text[: params.doc_cap]
            if i % HELD_OUT_EVERY == 0 and held_chars < params.eval_chars:
                self.held_out.append(text)
                held_chars += len(text)
                continue
            yield text
            self.chars += len(text)
            if i % 256 == 1:
                self.job.progress(min(self.chars, self.about_chars), self.about_chars, unit="characters")
                if self.job.should_stop:
                    raise Stopped("stopped while reading text; the tokenizer starts over")
            if self.chars >= params.max_chars:
                return

    def _texts(self) -> Iterator[str]:
        from data.shards import documents

        for path in self.shards:
            for texts in documents(path, self.column):
                yield from texts


def _bytes_per_token(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)


def _compare(texts: list[str]) -> dict[str, Any]:
    """Bytes a token of GPT-2's and GPT-4's tokenizers, where tiktoken has their vocabularies on disk already."""
    import tiktoken

    compared: dict[str, Any] = {}
    for label, name in (("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")):
        try:
            with _no_network():
                encoding = tiktoken.get_encoding(name)
            compared[label] = _bytes_per_token(encoding.encode_ordinary, texts)
        except _NotOnDisk:
            compared[label] = {"skipped": f"the vocabulary of {name} is not in tiktoken's cache on this machine"}
    return compared


class _NotOnDisk(Exception):
    pass


@contextmanager
def _no_network() -> Iterator[None]:
    """tiktoken looks in its cache and then asks the network; it has no switch for the second."""
    import tiktoken.load

    def refuse(blobpath: str) -> bytes:
        raise _NotOnDisk(blobpath)

    fetch = tiktoken.load.read_file
    tiktoken.load.read_file = refuse
    try:
        yield
    finally:
        tiktoken.load.read_file = fetch
