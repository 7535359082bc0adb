"""download: text shards and data sets as artifacts, each file known by its sha256 before a byte of it is fetched.

Text (`what: text`) is parquet shards and one pinned validation shard, listed in shards.json. A data set
(`what: dataset`) keeps the names its repository gives it, listed in dataset.json.
"""

import importlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from model.checks import Count, Fraction, Seed
from pipeline.job import Job, Stopped


@dataclass
class Params:
    """What to have. Where it is does not enter the key; the sha256 of each file does, through `data_identity`."""

    source: str  # import path: data.sources.hub, url, local, pydocs, or a module of your own (data/sources/source.py)
    what: Literal["text", "dataset"] = "text"
    repo_id: str | None = field(default=None, metadata={"key": False})  # hub: ORG/NAME of a data set repository
    revision: str = field(default="main", metadata={"key": False})  # hub: branch, tag or commit
    urls: list[str] = field(default_factory=list, metadata={"key": False})  # url: one file, and where else it is
    paths: list[str] = field(default_factory=list, metadata={"key": False})  # local: files or folders
    files: list[str] = field(default_factory=list)  # hub data set: names or globs in the repository
    shard: str = "shard_{:05d}.parquet"  # hub text: how shards are named, counted from 0
    train_shards: Count | None = None  # text: how many; null: all (not on a hub)
    val_shard: str | None = None  # text: the file held out; null (not on a hub): hold out single documents
    validation: bool = True  # text: false keeps the held-out text away altogether, as the tokenizer's input does
    shard_tokens: Count | None = field(default=None, metadata={"key": False})  # text: about as many, to check horizons
    column: str = "text"  # text: the column of a parquet file, the field of a jsonl line
    extract: bool = False  # url: also unpack a zip beside it
    shard_chars: Count = 50_000_000  # local text without val_shard: characters a shard
    val_fraction: Fraction | None = None  # held out without a val_shard; null: 0.01 (pydocs: 0.05 of its modules)
    seed: Seed = 0  # pydocs: the order of the pages


def data_identity(params: Params, memory: dict[str, Any], online: bool) -> dict[str, Any] | None:
    """{"files": what the data is, "source": where it is}; None when that takes the network and `online` is False.

    `memory` keeps what was found out, by endpoint, repository and branch; memory["endpoint"] is the hub to ask,
    memory["send_token"] the endpoints besides the official hub that get the user's token. Raises DataError.
    """
    return _source(params).identity(params, memory, online)


def _source(params: Params) -> Any:
    from data.errors import DataMistake

    try:
        return importlib.import_module(params.source)
    except ImportError as error:
        raise DataMistake(
            f"data.source={params.source}: {error}. Name data.sources.hub, url, local, pydocs or one of your own."
        ) from error


def main(job: Job[Params]) -> dict[str, Any]:
    from data.sources.fetch import Blobs
    from data.sources.source import Request
    from data.trust import below

    params = job.params
    source = _source(params)
    what = job.data_identity if job.data_identity is not None else source.identity(params, {}, True)
    request = Request(
        params=params,
        identity=what,
        out=job.out,
        scratch=job.scratch,
        blobs=Blobs(job.store / "blobs"),
        workers=job.launch.workers,
        on_progress=lambda done, total: job.progress(done, total, unit="bytes"),
        should_stop=lambda: job.should_stop,
        say=job.say,
    )
    made = source.make(request)
    if made is None:
        raise Stopped("stopped while fetching; what has come is kept")
    names = [*made.files, *([made.val] if made.val else [])]
    paths = [below(job.out, name, params.source) for name in names]
    if params.what == "text":
        listing = {"train": made.files, "val": made.val, "column": params.column}
        (job.out / "shards.json").write_text(json.dumps(listing, indent=1))
    else:
        (job.out / "dataset.json").write_text(json.dumps({"files": made.files}, indent=1))
    return {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
