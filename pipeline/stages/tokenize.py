"""tokenize: each text shard once into a flat file of token ids, kept in the store by tokenizer and shard."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.job import Job, Stopped


@dataclass
class Params:
    """Nothing to choose: the text and the tokenizer say it all."""


@dataclass
class _Shard:
    index: int
    name: str
    split: str
    path: Path
    column: str
    bytes: int  # of text, as the file's footer counts them
    tokenizer: Path
    store: Path


def main(job: Job[Params]) -> dict[str, Any]:
    from data.durable import link
    from data.helpers import run_in_helpers
    from data.tokens.files import token_dtype
    from data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(job.inputs["tokenizer"])
    shards = _shards(job)
    progress = _Progress(job, shards)
    made = run_in_helpers(_tokenize, shards, job.launch.workers, progress.add, lambda: job.should_stop)
    if made is None:
        raise Stopped("stopped between shards; those that are done are kept")
    listing = []
    for shard, file in zip(shards, made):
        name = _flat(shard.name)
        link(Path(file.folder) / "tokens.npy", job.out / f"{name}.tokens.npy")
        link(Path(file.folder) / "offsets.npy", job.out / f"{name}.offsets.npy")
        entry = {"name": name, "sha256": file.shard_sha256, "split": shard.split}
        listing.append(entry | {"tokens": file.tokens, "documents": file.documents})
    described = {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "bos": tokenizer.bos,
        "vocab_size": tokenizer.vocab_size,
        "shards": listing,
    }
    (job.out / "tokens.json").write_text(json.dumps(described, indent=1))
    train = sum(file.tokens for shard, file in zip(shards, made) if shard.split == "train")
    total = sum(file.tokens for file in made)
    job.say(f"{total:,} tokens in {len(shards)} shards, {progress.tokens:,} of them new")
    return {"shards": len(shards), "train_tokens": train, "val_tokens": total - train} | progress.speed()


def _flat(name: str) -> str:
    """A shard's name without its suffix, and in one folder: train/0.parquet and val/0.parquet stay two."""
    return str(PurePosixPath(name).with_suffix("")).replace("/", "--")


def _shards(job: Job[Params]) -> list[_Shard]:
    """What there is to do. Looks at each footer, so that a shard that was cut off is known before any work is done."""
    from data.text.files import read_listing, text_bytes

    folder = job.inputs["shards"]
    train, val, column = read_listing(folder)
    names = [(name, "train") for name in train] + ([(val, "val")] if val else [])
    return [
        _Shard(
            index=i,
            name=name,
            split=split,
            path=folder / name,
            column=column,
            bytes=text_bytes(folder / name, column),
            tokenizer=job.inputs["tokenizer"],
            store=job.store / "tokens",
        )
        for i, (name, split) in enumerate(names)
    ]


def _tokenize(shard: _Shard, report: Callable[[tuple[int, int, int]], None]) -> Any:
    """Runs in a helper process; reports (index, bytes, tokens) of text that is done, and bytes=-1 for all of it."""
    from data.tokens.files import tokenize_shard

    made = tokenize_shard(
        shard.path,
        shard.column,
        shard.tokenizer,
        shard.store,
        lambda size, tokens: report((shard.index, size, tokens)),
    )
    report((shard.index, -1, 0))
    return made


class _Progress:
    """Adds up what the helpers report: megabytes of text done of all, and the speed of what is new."""

    def __init__(self, job: Job[Params], shards: list[_Shard]):
        self.job = job
        self.sizes = [shard.bytes for shard in shards]
        self.done = [0] * len(shards)
        self.bytes = self.tokens = 0
        self.started = time.monotonic()

    def add(self, report: tuple[int, int, int]) -> None:
        index, size, tokens = report
        if size < 0:
            self.done[index] = self.sizes[index]
        else:
            self.done[index] = min(self.sizes[index], self.done[index] + size)
            self.bytes += size
            self.tokens += tokens
        shown = {name.removesuffix("_per_s"): round(value, 2) for name, value in self.speed().items()}
        self.job.progress(sum(self.done) / 1e6, sum(self.sizes) / 1e6, unit="MB", **shown)

    def speed(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {"MB_per_s": self.bytes / 1e6 / seconds, "tokens_per_s": self.tokens / seconds} if self.tokens else {}
