"""What a source of data is: a module with `identity` and `make`, named by import path in the download stage's params.

    identity(params, memory, online) -> {"files": ..., "source": ...} | None    what the data is, before it is here
    make(request) -> Made | None                                                put it into request.out; None: stopped

`files` says what the data is and enters keys; `source` says where it is and does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sources.blobs import Blobs, link
from data.trust import below


@dataclass
class Request:
    """params: the download stage's. identity: as the source's own hook resolved it. workers: connections at once.

    on_progress(done, total) in bytes; should_stop() is asked often; say(line) reaches the person who watches.
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


@dataclass
class Made:
    """Names below request.out: of all files of a data set, or of the shards to train on and the one held out."""

    files: list[str]
    val: str | None = None


def link_all(files: dict[str, str], request: Request) -> None:
    """Put blobs (name -> sha256) into request.out."""
    for name, sha256 in files.items():
        link(request.blobs.path(sha256), below(request.out, name, "the source"))
