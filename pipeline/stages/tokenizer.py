"""tokenizer: a byte-level BPE vocabulary from the first text shards, and how well it does on text it has not seen."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checks import Count
from pipeline.job import Counted, Job, Stopped
from pipeline.stage import Inputs

if TYPE_CHECKING:
    from data.tokens.bpe import ShardText


KEPT = "stopped; the shards whose words are counted are kept"


@dataclass
class Params:
    vocab_size: Count | None = None  # exactly, special tokens included; null: max_vocab_size, or what the text gives
    max_vocab_size: Count = 65536
    max_chars: Count = 2_000_000_000  # of text to train on, the same of each shard
    doc_cap: Count = 10_000  # characters of one document; a longer one gives its start
    eval_chars: Count = 1_000_000  # of held-out text to measure on

    @property
    def most_tokens(self) -> int:
        """The vocabulary size that planning assumes; too little text gives fewer tokens."""
        return self.vocab_size or self.max_vocab_size


def check(params: Params, inputs: Inputs) -> None:
    """Raises DataMistake for a vocabulary that cannot hold bytes and special tokens."""
    if params.most_tokens < 512:  # importing what knows the exact number takes longer than a plan should
        from data.tokens import bpe

        bpe.check_vocab_size(params.most_tokens)


def main(job: Job[Params]) -> dict[str, Any]:
    from data.errors import DataError
    from data.helpers import run_in_helpers
    from data.tokens import bpe
    from data.tokens.bpe import read_counts

    params = job.params
    bpe.check_vocab_size(params.most_tokens)
    shards = _shards(job)
    held_out = list(shards[0].text.held_out())
    started = time.monotonic()
    counting = Counted(job, sum(shard.expected_chars for shard in shards), "characters", KEPT)
    if run_in_helpers(_count, shards, job.launch.workers, counting.add, lambda: job.should_stop) is None:
        raise Stopped(KEPT)
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(read_counts(shard.kept))
    chars = sum(len(word) * count for word, count in counts.items())
    job.say(f"{len(counts):,} different words in {chars:,} characters")
    learning = Counted(job, chars + counts.total(), "characters of words", KEPT)
    ranks = bpe.learn(counts, params.most_tokens, learning.add, exact=params.vocab_size is not None)
    seconds = time.monotonic() - started
    if not held_out:
        raise DataError(f"{job.inputs['text']}: has no document to measure the tokenizer on. Give more text.")
    tokenizer = bpe.save(ranks, job.out)
    if tokenizer.vocab_size < params.most_tokens:
        job.say(
            f"The text gives a vocabulary of {tokenizer.vocab_size:,} tokens, not the {params.most_tokens:,} of "
            f"{job.stage}.params.max_vocab_size. Use more text for more tokens."
        )
    measured = _bytes_per_token(tokenizer.encode, held_out)
    evaluation = {
        "held_out": {"documents": len(held_out), "bytes": sum(len(text.encode()) for text in held_out)},
        "bytes_per_token": {"this": measured, **_compare(held_out)},
    }
    (job.out / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    job.say(f"{tokenizer.vocab_size:,} tokens; {measured:.3f} bytes a token on held-out text")
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": measured,
        "train_chars": chars,
        "train_seconds": seconds,
    }


@dataclass
class _Shard:
    text: "ShardText"
    expected_chars: int  # about: the file's footer counts bytes
    kept: Path  # its counts


def _shards(job: Job[Params]) -> list[_Shard]:
    """What there is to count; held-out documents are of the first shard."""
    from data.text.files import read_listing, text_bytes
    from data.tokens.bpe import ShardText

    params, folder = job.params, job.inputs["text"]
    train, _, column = read_listing(folder)
    share = -(-params.max_chars // len(train))
    shards: list[_Shard] = []
    for number, name in enumerate(train):
        held_out = params.eval_chars if number == 0 else 0
        text = ShardText(folder / name, column, params.doc_cap, share, held_out)
        expected = min(share, text_bytes(text.path, text.column))
        shards.append(_Shard(text, expected, job.scratch / f"{number}.counts.parquet"))
    return shards


def _count(shard: _Shard, report: Callable[[int], None]) -> None:
    """Runs in a helper process; reports characters."""
    from data.tokens.bpe import PATTERN, count_shard

    count_shard(shard.text, PATTERN, shard.kept, lambda chars: report(min(chars, shard.expected_chars)))


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
