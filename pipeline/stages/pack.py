"""pack: how the tokens of the training shards are laid out in rows, as an index over the token files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.checks import Count
from pipeline.job import Job, Stopped


@dataclass
class Params:
    # stream: every token once; bestfit: rows begin with a document, and a third of the tokens is cropped
    method: Literal["stream", "bestfit"] = "stream"
    sequence_len: Count = 2048  # input tokens per row; a row stores one more, the last target
    window: Count = 1000  # bestfit: documents to choose from


def main(job: Job[Params]) -> dict[str, Any]:
    from data.errors import DataMistake
    from data.tokens.packing import TokenSpan

    params = job.params
    span = TokenSpan(job.inputs["tokens"], "train")
    rows, kept = _stream(job, span) if params.method == "stream" else _best_fit(job, span)
    if rows < 1:
        raise DataMistake(
            f"{job.inputs['tokens']}: {len(span):,} training tokens do not fill one row of {params.sequence_len + 1} "
            f"({params.method}). Take more text or a shorter pack.params.sequence_len."
        )
    described = {
        "method": params.method,
        "sequence_len": params.sequence_len,
        "rows": rows,
        "tokens": kept,
        "source_tokens": len(span),
    }
    (job.out / "pack.json").write_text(json.dumps(described, indent=1))
    dropped = 1 - kept / len(span)
    job.say(f"{rows:,} rows of {params.sequence_len}, {dropped:.1%} of {len(span):,} tokens left out")
    return {"rows": rows, "tokens": kept, "left_out": dropped}


def _stream(job: Job[Params], span: Any) -> tuple[int, int]:
    """(rows, tokens kept): each token but the first is a target once; the end that fills no row is left out."""
    rows = max(0, len(span) - 1) // job.params.sequence_len
    return rows, rows * job.params.sequence_len + 1 if rows else 0


def _best_fit(job: Job[Params], span: Any) -> tuple[int, int]:
    """(rows, tokens kept). Writes first.npy (R + 1,) int64, the first piece of each row and the end; starts.npy (S,)
    int64, the token each piece starts at; lengths.npy (S,) int32. A row takes its pieces from one shard.
    """
    import numpy as np

    from data.tokens.packing import best_fit

    firsts, starts, lengths, pieces = [np.zeros(1, np.int64)], [], [], 0
    for i, name in enumerate(span.names):
        if job.should_stop:
            raise Stopped(f"stopped before {name}; packing starts over")
        offsets = np.load(job.inputs["tokens"] / f"{name}.offsets.npy", allow_pickle=False)
        packing = best_fit(np.diff(offsets), job.params.sequence_len + 1, job.params.window)
        firsts.append(packing.first[1:] + pieces)
        pieces += len(packing.lengths)
        starts.append(span.starts[i] + offsets[packing.documents])
        lengths.append(packing.lengths)
        job.progress(i + 1, len(span.names), unit="shards")
    for name, parts in (("first", firsts), ("starts", starts), ("lengths", lengths)):
        np.save(Path(job.out) / f"{name}.npy", np.concatenate(parts))
    rows = sum(len(first) for first in firsts) - 1
    return rows, int(sum(part.sum() for part in lengths))
