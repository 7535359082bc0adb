"""Conversations of a mixture, rendered, masked and packed into rows: what midtrain and sft train on.

Reads   tokenizer, and the data sets that the mixture names
Writes  rows.tokens.npy (R, T + 1) uint16 or uint32, rows.mask.npy (R, T + 1) uint8, rows.json
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from data.tasks.mixture import TaskSpec
from model.checks import Count, Seed
from pipeline.job import Job, Stopped
from pipeline.stage import Inputs

if TYPE_CHECKING:
    import numpy as np

    from data.chat.conversation import Conversation
    from data.tasks.mixture import TaskSequence
    from data.tokens.tokenizer import Tokenizer

CHUNK = 2048  # conversations rendered at once; what a crash can cost
SLICE = 64  # of them, one after the other in one thread


@dataclass
class Params:
    mixture: list[TaskSpec] = field(default_factory=list)
    order: Literal["mixture", "sequence"] = "mixture"  # all tasks shuffled together, or one after the other
    sequence_len: Count = 2048  # tokens of context; a row has one more
    mask: Literal["assistant", "all"] = "assistant"  # what is trained on: what the assistant writes, or everything
    seed: Seed = 0  # of the shuffle


def check(params: Params, inputs: Inputs) -> None:
    """Raises TaskError for a mixture of nothing, and for rows that hold nothing."""
    from data.tasks.task import TaskError

    if not params.mixture or params.sequence_len < 2:
        raise TaskError("needs a mixture of at least one task and a sequence_len of at least 2")


def main(job: Job[Params]) -> dict[str, Any]:
    """Render in chunks that survive a crash, then pack. Raises DataError for tasks that cannot be read."""
    from data.tasks.mixture import TaskMixture, TaskSequence, load_tasks
    from data.text.files import counted
    from data.tokens.tokenizer import Tokenizer

    params = job.params
    check(params, {})
    tokenizer = Tokenizer.load(job.inputs["tokenizer"])
    tasks = load_tasks(params.mixture, lambda name: job.inputs[f"dataset/{name}"])
    for spec, task in zip(params.mixture, tasks):
        if notes := counted(task.notes):
            job.say(f"{spec.label}: {notes}")
    repeats = [spec.repeat for spec in params.mixture]
    if params.order == "sequence":
        mixture = TaskSequence(tasks, repeats)
    else:
        mixture = TaskMixture(tasks, repeats, params.seed)
    for start in range(0, len(mixture), CHUNK):
        if job.should_stop:
            raise Stopped(f"{start} of {len(mixture)} conversations are rendered")
        _render_chunk(job, mixture, start, tokenizer)
        job.progress(min(start + CHUNK, len(mixture)), len(mixture), "conversations")
    return _write_rows(job, mixture, tokenizer)


def _render_chunk(job: Job[Params], mixture: "TaskSequence", start: int, tokenizer: "Tokenizer") -> None:
    """Conversations start to start + CHUNK as two files: one flat array of 2 * id + mask, and (N, 2) length, fate.

    The second file is written last: where it is, the chunk is whole.
    """
    import numpy as np

    if (job.scratch / f"{start}.fates.npy").exists():
        return
    conversations = [mixture[i] for i in range(start, min(start + CHUNK, len(mixture)))]
    slices = [conversations[i : i + SLICE] for i in range(0, len(conversations), SLICE)]
    row_tokens, all_tokens = job.params.sequence_len + 1, job.params.mask == "all"
    # Threads are enough: the tokenizer works without Python's lock.
    with ThreadPoolExecutor(max(1, job.launch.workers)) as pool:
        done = list(pool.map(lambda some: [_render(c, tokenizer, row_tokens, all_tokens) for c in some], slices))
    rendered = [item for some in done for item in some]
    fates = np.array([(len(marked), fate) for marked, fate in rendered], np.int32)
    _save(job, f"{start}.tokens.npy", np.concatenate([marked for marked, _ in rendered]))
    _save(job, f"{start}.fates.npy", fates)


def _render(
    conversation: "Conversation", tokenizer: "Tokenizer", row_tokens: int, all_tokens: bool
) -> tuple["np.ndarray", int]:
    """2 * id + mask of the tokens that go into a row, uint32, and the conversation's fate."""
    import numpy as np

    from data.chat.conversation import ASSISTANT, check, encoded, is_empty_answer
    from data.chat.rows import Fate, fit
    from data.errors import DataError

    try:
        check(conversation)
    except DataError:
        return np.zeros(0, np.uint32), Fate.MALFORMED
    if any(is_empty_answer(message) and message.get("weight") != 0 for message in conversation["messages"]):
        return np.zeros(0, np.uint32), Fate.EMPTY
    ids: list[int] = []
    answered: list[int] = []
    mask: list[int] = []
    for tokens, piece in encoded(conversation, tokenizer):
        ids += tokens
        answered += [int(piece.trained)] * len(tokens)
        mask += [int(not piece.muted if all_tokens else piece.trained)] * len(tokens)
    n, fate = fit(ids, answered, row_tokens, tokenizer.special[ASSISTANT[1]])
    return np.array(ids[:n], np.uint32) * np.uint32(2) + np.array(mask[:n], np.uint32), fate


def _save(job: Job[Params], name: str, array: "np.ndarray") -> None:
    import numpy as np

    from data.durable import put_in_place

    temporary = job.scratch / "chunk.tmp"
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    put_in_place(temporary, job.scratch / name)


def _write_rows(job: Job[Params], mixture: "TaskSequence", tokenizer: "Tokenizer") -> dict[str, Any]:
    """Pack the chunks into rows; padded with <|bos|>, which is not trained on there."""
    import numpy as np

    from data.chat.rows import best_fit_whole
    from data.durable import reserve
    from data.errors import DataMistake

    fates = np.concatenate([np.load(job.scratch / f"{s}.fates.npy") for s in range(0, len(mixture), CHUNK)])
    row_tokens = job.params.sequence_len + 1
    rows = best_fit_whole(fates[:, 0], row_tokens)
    if not rows:
        raise DataMistake(
            f"{job.stage}: not one of {len(mixture)} conversations has an answer within {row_tokens} tokens. "
            "Raise sequence_len, or choose other tasks."
        )
    chunks = [np.load(job.scratch / f"{s}.tokens.npy", mmap_mode="r") for s in range(0, len(mixture), CHUNK)]
    lengths = fates[:, 0].astype(np.int64)
    starts = np.concatenate([np.cumsum(part) - part for part in np.split(lengths, range(CHUNK, len(lengths), CHUNK))])
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    shape = (len(rows), row_tokens)
    tokens = np.lib.format.open_memmap(job.out / "rows.tokens.npy", "w+", dtype, shape)
    mask = np.lib.format.open_memmap(job.out / "rows.mask.npy", "w+", np.uint8, shape)
    for name in ("tokens", "mask"):
        reserve(job.out / f"rows.{name}.npy")
    trained = np.zeros(len(lengths), np.int64)
    for r, row in enumerate(rows):
        tokens[r] = tokenizer.bos
        at = 0
        for i in row:
            piece = chunks[i // CHUNK][starts[i] : starts[i] + lengths[i]]
            tokens[r, at : at + len(piece)] = piece >> 1
            mask[r, at : at + len(piece)] = piece & 1
            trained[i] = np.count_nonzero(piece[1:] & 1)
            at += len(piece)
    tokens.flush()
    mask.flush()
    described = _describe(job, mixture, fates, trained, len(rows))
    (job.out / "rows.json").write_text(json.dumps(described, indent=1) + "\n")
    return {name: value for name, value in described.items() if isinstance(value, int | float)}


def _describe(
    job: Job[Params], mixture: "TaskSequence", fates: "np.ndarray", trained: "np.ndarray", rows: int
) -> dict[str, Any]:
    import numpy as np

    from data.chat.rows import Fate

    task_of = np.array([task for task, _ in mixture.items])

    def counts(chosen: "np.ndarray") -> dict[str, int]:
        fate = fates[chosen, 1]
        return {
            "conversations": int(np.count_nonzero(fates[chosen, 0])),
            "tokens": int(fates[chosen, 0].sum(dtype=np.int64)),
            "trained_tokens": int(trained[chosen].sum()),
            "cut": int(np.count_nonzero(fate == Fate.CUT)),
            "dropped": int(np.count_nonzero(fate >= Fate.TOO_LONG)),
        }

    total = counts(np.ones(len(fates), bool))
    dropped = {
        reason.name.lower(): int(np.count_nonzero(fates[:, 1] == reason)) for reason in Fate if reason >= Fate.TOO_LONG
    }
    if total["dropped"]:
        reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n)
        job.say(f"{total['dropped']} of {len(fates)} conversations dropped ({reasons}), {total['cut']} cut at a turn")
    return {
        "sequence_len": job.params.sequence_len,
        "rows": rows,
        **total,
        "filled": total["tokens"] / (rows * (job.params.sequence_len + 1)),
        "order": job.params.order,
        "mask": job.params.mask,
        "dropped_because": dropped,
        "tasks": [{"name": spec.label, **counts(task_of == t)} for t, spec in enumerate(job.params.mixture)],
    }
