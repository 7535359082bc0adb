"""CORE: the mean centred accuracy over DCLM's 22 tasks (Li et al., 2024), in batches.

Items of about the same length share a batch. The common beginning of an item's options, mostly its few-shot examples,
is read once into a key/value cache; the head is applied only to the positions that count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokens.tokenizer import Tokenizer
from evals.core_prompts import Option, Question, TaskItems, common_prefix, encode, read_bundle
from evals.ledger import Ledger
from evals.metrics import wilson
from model.decoding.kvcache import KVCache
from model.gpt import GPT

TASKS = 22  # of the whole CORE; fewer are never called CORE
CHARACTERS_PER_TOKEN = 3  # a low estimate, for cutting a task into chunks before anything is encoded
HEAD_LOGITS = 1 << 23  # logits in memory at once


@dataclass(frozen=True)
class CoreSettings:
    """max_per_task: items of each task. batch_tokens: of one forward pass, padding included."""

    max_per_task: int | None = None
    batch_tokens: int = 16_384
    threads: int = 1  # for the tokenizer


class Core:
    """The bundle in `folder`: all ranks measure it, one collects the result.

    Raises DataError for a folder without a bundle.
    """

    def __init__(self, folder: Path, settings: CoreSettings) -> None:
        self.settings = settings
        self.tasks = [TaskItems.load(task, settings.max_per_task) for task in read_bundle(folder)]
        self.chunks = {items.task.label: plan(items, settings.batch_tokens) for items in self.tasks}
        self.items = sum(items.count for items in self.tasks)

    def measure(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        ledger: Ledger,
        check: Callable[[], None],
        progress: Callable[[int, str], None],
    ) -> None:
        """Score this rank's share of the chunks. check() is called before each and may raise to stop; recorded chunks
        are not scored again. progress(items done, label) follows each."""
        for items in self.tasks:
            label, chunks = items.task.label, self.chunks[items.task.label]
            for number in ledger.share(f"core/{label}", len(chunks)):
                check()
                questions = encode(items, chunks[number], tokenizer, model.config.sequence_len, self.settings.threads)
                exact = items.task.kind == "language_modeling"
                right = score(model, questions, exact, self.settings.batch_tokens)
                cropped = sum(question.cropped for question in questions)
                answers = [[index, int(answer)] for index, answer in zip(chunks[number], right)]
                ledger.record(f"core/{label}", number, answers=answers, cropped=cropped)
                progress(len(questions), label)

    def collect(self, ledger: Ledger, check: Callable[[], None]) -> dict[str, Any]:
        """The result of all ranks: score, and by task label accuracy, its interval, centred accuracy, baseline, counts,
        seconds."""
        accuracy: dict[str, float] = {}
        centered: dict[str, float] = {}
        seconds: dict[str, float] = {}
        cropped = 0
        for items in self.tasks:
            label, baseline = items.task.label, items.task.baseline
            records = ledger.wait(f"core/{label}", len(self.chunks[label]), check)
            accuracy[label] = sum(right for record in records for _, right in record["answers"]) / items.count
            centered[label] = (accuracy[label] - baseline) / (1 - baseline)
            seconds[label] = round(ledger.seconds(records), 3)
            cropped += sum(record["cropped"] for record in records)
        return {
            "score": sum(centered.values()) / len(centered),
            "centered": centered,
            "accuracy": accuracy,
            "ci": {items.task.label: list(wilson(accuracy[items.task.label], items.count)) for items in self.tasks},
            "baseline": {items.task.label: items.task.baseline for items in self.tasks},
            "counts": {items.task.label: items.count for items in self.tasks},
            "tasks": len(self.tasks),
            "of": TASKS,
            "items": self.items,
            "cropped": cropped,
            "seconds": round(sum(seconds.values()), 3),
            "seconds_by_task": seconds,
        }


def score_name(core: dict[str, Any]) -> str:
    """The name of the score: CORE only when it has all tasks."""
    return "CORE" if core["tasks"] == core["of"] else f"CORE-{core['tasks']}/{core['of']}"


def plan(items: TaskItems, batch_tokens: int) -> list[list[int]]:
    """Chunks of item numbers, the longest items first, each chunk about one batch; the same for any number of ranks."""
    length = {index: items.characters(index) for index in range(items.count)}
    chunks: list[list[int]] = [[]]
    used = 0
    for index in sorted(length, key=lambda index: (-length[index], index)):
        if chunks[-1] and used + length[index] > batch_tokens * CHARACTERS_PER_TOKEN:
            chunks.append([])
            used = 0
        chunks[-1].append(index)
        used += length[index]
    return chunks


def score(model: GPT, questions: Sequence[Question], exact: bool, batch_tokens: int) -> list[bool]:
    """True for each question that is answered right.

    exact: every target token must be the likeliest one; else the gold option must have the lowest mean loss.
    """
    right = [False] * len(questions)
    shared = [_shared(question) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (shared[i], max(len(o.ids) for o in questions[i].options)))
    for batch in _batches(order, questions, shared, batch_tokens):
        options = [option for i in batch for option in questions[i].options]
        owner = [place for place, i in enumerate(batch) for _ in questions[i].options]
        losses, hits = _score_options(model, options, owner, [shared[i] for i in batch])
        at = 0
        for i in batch:
            count = len(questions[i].options)
            mine = losses[at : at + count]
            right[i] = hits[at] if exact else mine.index(min(mine)) == questions[i].gold
            at += count
    return right


def _shared(question: Question) -> int:
    """Number of tokens that all options begin with, less those whose own prediction is needed."""
    if len(question.options) == 1:
        return 0
    common = common_prefix([option.ids for option in question.options])
    return max(0, min(common, *(option.start for option in question.options)) - 1)


def _batches(
    order: list[int], questions: Sequence[Question], shared: list[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Neighbours in `order` as long as their padded tokens stay within batch_tokens; at least one question each."""
    batch: list[int] = []
    rows = longest = prefix = 0
    for i in order:
        own = max(len(option.ids) for option in questions[i].options) - shared[i]
        longest, prefix, rows = max(longest, own), max(prefix, shared[i]), rows + len(questions[i].options)
        if batch and rows * longest + (len(batch) + 1) * prefix > batch_tokens:
            yield batch
            batch, longest, prefix, rows = [], own, shared[i], len(questions[i].options)
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _score_options(
    model: GPT, options: list[Option], owner: list[int], shared: list[int]
) -> tuple[list[float], list[bool]]:
    """Mean loss of each option's span, and True if all of its tokens are the likeliest.

    owner[i]: the question of option i; shared[question]: the number of tokens that its options have in common.
    """
    device = model.lm_head.weight.device
    tails = _padded([option.ids[shared[place] :] for option, place in zip(options, owner)], device)
    cache = _read_shared(model, options, owner, shared, tails.size(1))
    hidden = model.hidden(tails, cache)  # (options, T, C)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (option, place) in enumerate(zip(options, owner)):
        rows += [row] * (option.end - option.start)
        columns += range(option.start - 1 - shared[place], option.end - 1 - shared[place])
        targets += option.ids[option.start : option.end]
    losses, hits = _losses(model, hidden[torch.tensor(rows), torch.tensor(columns)], torch.tensor(targets).to(device))
    spans = [option.end - option.start for option in options]
    means = [float(part.mean()) for part in losses.split(spans)]
    return means, [bool(part.all()) for part in hits.split(spans)]


def _read_shared(model: GPT, options: list[Option], owner: list[int], shared: list[int], room: int) -> KVCache | None:
    """A cache with a row for each option: the tokens that its question's options share, and `room` for more."""
    if max(shared) == 0:
        return None
    device, dtype = model.lm_head.weight.device, model.compute_dtype
    first = [options[owner.index(place)].ids[: shared[place]] for place in range(len(shared))]
    read = KVCache(model.config, len(shared), max(shared), device, dtype)
    model.hidden(_padded(first, device), read)
    read.advance(shared)
    spread = KVCache(model.config, len(options), max(shared) + room, device, dtype)
    spread.adopt(list(range(len(options))), read, owner)
    return spread


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(device)


def _losses(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) float64 nats and (N,) bool on the CPU: the loss of each target, and True if it is the likeliest token."""
    losses, hits = [], []
    size = max(1, HEAD_LOGITS // (model.config.vocab_size or 1))
    for part, wanted in zip(hidden.split(size), targets.split(size)):
        logits = model.head(part)
        at_target = logits.gather(1, wanted[:, None])[:, 0]
        losses.append((logits.logsumexp(-1) - at_target).double().cpu())
        hits.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(losses), torch.cat(hits)
