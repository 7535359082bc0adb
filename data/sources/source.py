"""A source of data: a module with `identity` and `make`, named by its import path in the params of the download stage.

    identity(params, memory, online) -> {"files": ..., "source": ...} | None    what the data is, before it is here
    make(request) -> Made | None                                                put it into request.out; None: stopped

`files` describes the data and enters keys; `source` describes where it is and does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import link
from data.sources.fetch import Blobs, Wanted, fetch_all
from data.trust import below


@dataclass
class Request:
    """params: of the download stage. identity: as the source's own hook returned it. workers: number of connections.

    on_progress(done, total) in bytes; should_stop() should be called often; say(line) prints a line for the user.
    """

    params: Any
    identity: dict[str, Any]
    out: Path
    scratch: Path
    blobs: Blobs
    workers: int
    on_progress: Callable[[float, float], None]
    should_stop: Callable[[], bool]
    say: Callable[[str], None] = lambda line: None

    def fetch(self, wanted: list[Wanted]) -> bool:
        """Fetch files and link them into `out` by name; False if stopped before all were there."""
        if not fetch_all(wanted, self.blobs, self.workers, self.on_progress, self.should_stop, self.say):
            return False
        for item in wanted:
            link(self.blobs.path(item.sha256), below(self.out, item.name, "the source"))
        return True


@dataclass
class Made:
    """Names below request.out: of all files of a data set, or of the shards to train on and the validation shard."""

    files: list[str]
    val: str | None = None
