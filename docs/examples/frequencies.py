"""A stage: how often each token occurs in the validation text.

Reads   tokens (tokenize), tokenizer
Writes  frequencies.json
"""

import json
from dataclasses import dataclass
from typing import Any

from model.checks import Count
from pipeline.job import Job

CHUNK = 1 << 20  # tokens


@dataclass
class Params:
    most: Count = 100  # tokens to list


def main(job: Job[Params]) -> dict[str, Any]:
    """Imports of what takes time to load are in here: planning imports this module, too."""
    import numpy as np

    from data.tokens.packing import TokenSpan
    from data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(job.inputs["tokenizer"])
    stream = TokenSpan(job.inputs["tokens"], "val")
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(stream), CHUNK):
        chunk = np.empty(min(CHUNK, len(stream) - start), np.int64)
        stream.copy(start, chunk)
        counts += np.bincount(chunk, minlength=len(counts))
        job.progress(start + len(chunk), len(stream), "tokens")
    most = np.argsort(-counts, kind="stable")[: job.params.most]
    listed = [[tokenizer.decode([int(token)]), int(counts[token])] for token in most]
    (job.out / "frequencies.json").write_text(json.dumps(listed, ensure_ascii=False, indent=1) + "\n")
    job.say(f"{int((counts > 0).sum()):,} of {len(counts):,} tokens occur")
    return {"used": int((counts > 0).sum()), "tokens": int(counts.sum())}
