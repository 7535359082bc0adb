"""Text to measure with, and the stages that prepare it, run as they are on folders of this invocation."""

import importlib
import json
from pathlib import Path
from typing import Any

from pipeline import typed
from pipeline.errors import UserError
from pipeline.job import Job, Launch, Logger
from pipeline.runner import machine as hardware
from pipeline.runner.environment import user_path

SHARDS = "shard_*.parquet"
COLUMN = "text"
PUBLISHED = ("fineweb-edu-100b-shuffle", "climbmix-400b-shuffle")  # looked for first in a hub's folder


def find_shards(data: str) -> list[Path]:
    """The text shards of a folder, or of the data set with text in a folder laid out like a hub. Raises UserError."""
    root = user_path(data)
    if not root.is_dir():
        raise UserError("is no folder", f"bench.data={data}")
    folders = {path.parent for path in [*root.glob(SHARDS), *root.glob(f"datasets/*/*/{SHARDS}")]}
    folder = min(folders, key=lambda path: (path.name not in PUBLISHED, path), default=None)
    if folder is None:
        raise UserError(f"has no {SHARDS} in it nor in datasets/*/*", f"bench.data={data}")
    return sorted(folder.glob(SHARDS))


def list_shards(train: list[Path], val: Path | None, folder: Path) -> Path:
    """A folder as the stage download leaves it, with links to shards that lie elsewhere."""
    folder.mkdir(parents=True)
    for path in [*train, *([val] if val else [])]:
        (folder / path.name).symlink_to(path.absolute())
    listing = {"train": [path.name for path in train], "val": val.name if val else None, "column": COLUMN}
    (folder / "shards.json").write_text(json.dumps(listing))
    return folder


class Stages:
    """Runs stage modules in this process; each has a folder below `root`, and its outputs are the next one's inputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics: dict[str, dict[str, Any]] = {}

    def text(self, data: str | None) -> Path:
        """Shards to read: those of `data`, else the text that every Python installation carries."""
        if data is not None:
            return list_shards(find_shards(data), None, self.root / "text")
        return self.run("download", {"source": "data.sources.pydocs", "validation": False}, {})

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
        launch = launch or Launch(workers=hardware.cores())
        job: Job[Any] = _Quiet(name, "0" * 16, params, launch, inputs, work, self.root / "store")
        job.loggers += [logger] if logger else []
        self.metrics[work.name] = module.main(job)
        return job.out


class _Quiet(Job[Any]):
    def say(self, text: str) -> None:
        """`bench` tells what is worth telling."""
