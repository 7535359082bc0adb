"""Contamination check: searches the training data for evaluation questions; the report warns of those it finds.

Reads   tokenizer; tokens (tokenize) and any number of rows (render); the data sets of tasks and of the CORE bundle
Writes  contamination.json
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.tasks.mixture import CoreSpec, TaskSpec
from model.checks import Count, Natural
from pipeline.job import Counted, Job

if TYPE_CHECKING:
    import numpy as np

    from data.tokens.tokenizer import Tokenizer
    from evals.contamination import EvaluationText, Lookup

KEPT = "stopped; finished parts of the training data are kept"
AHEAD = 4  # stretches of tokens a worker may have waiting


@dataclass
class Params:
    tasks: list[TaskSpec] = field(default_factory=list)  # chat tasks that are evaluated
    core: CoreSpec | None = None  # null: no CORE
    rl_tasks: list[TaskSpec] = field(default_factory=list)  # problems of rl, which are trained on and are not rows
    ngram: Count = 13  # tokens; a shorter question is looked up as a whole
    examples: Natural = 2  # found items of each task in contamination.json


@dataclass
class Source:
    """Training tokens and their name in the report. conversations: they have the special tokens of turns."""

    name: str
    parts: "list[np.ndarray]"
    conversations: bool

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self.parts)


def main(job: Job[Params]) -> dict[str, Any]:
    """Raises DataError for inputs that are not what they should be, Stopped when asked to."""
    from data.tokens.tokenizer import Tokenizer
    from evals.contamination import EvaluationText

    tokenizer = Tokenizer.load(job.inputs["tokenizer"])
    text = EvaluationText(job.params.ngram, tokenizer.vocab_size)
    texts = dict(evaluation_texts(job, tokenizer))
    for task, (items, chat) in texts.items():
        around = (tokenizer.special["<|user_start|>"], tokenizer.special["<|user_end|>"]) if chat else None
        text.add(task, tokenizer.encode_batch(items, job.launch.workers), around)
    sources = list(training_sources(job, tokenizer))
    reading = Counted(job, sum(source.tokens for source in sources), "tokens", KEPT)
    found = {source.name: text.found(look_through(text, source, reading)) for source in sources}
    described = describe(job.params, text, sources, found, {task: items for task, (items, _) in texts.items()})
    (job.out / "contamination.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    for name, task in described["tasks"].items():
        for source, count in task["found"].items():
            job.say(f"{name}: {count} of {task['checked']} items are in {source}")
    return {"tokens": reading.total, "found": sum(sum(task["found"].values()) for task in described["tasks"].values())}


def evaluation_texts(job: Job[Params], tokenizer: "Tokenizer") -> Iterator[tuple[str, tuple[list[str], bool]]]:
    """(name, (texts of the items, True if they are asked in conversations)) of each task."""
    from data.chat.conversation import pieces
    from data.tasks.mixture import load_tasks

    specs = job.params.tasks
    for spec, task in zip(specs, load_tasks(specs, lambda name: job.inputs[f"dataset/{name}"])):
        # The first text of a conversation is its first question, with the system message before it.
        asked = [next(p.text for p in pieces(task.conversation(i)) if not p.special) for i in range(len(task))]
        yield spec.label, (asked, True)
    if job.params.core is not None:
        from evals.core_prompts import TaskItems, read_bundle

        for core in read_bundle(job.inputs[f"dataset/{job.params.core.dataset}"]):
            items = TaskItems.load(core, job.params.core.max_per_task)
            yield f"CORE {core.label}", ([items.text(i) for i in range(items.count)], False)


def training_sources(job: Job[Params], tokenizer: "Tokenizer") -> Iterator[Source]:
    import numpy as np

    from data.chat.conversation import render
    from data.chat.rows import ConversationRows
    from data.tasks.mixture import load_tasks
    from data.tokens.packing import TokenSpan

    for name, folder in job.inputs.items():
        if (folder / "tokens.json").exists():
            yield Source(name, TokenSpan(folder, "train").parts, False)
        elif (folder / "rows.json").exists():
            yield Source(name, [ConversationRows(folder).tokens.reshape(-1)], True)
    specs = job.params.rl_tasks
    problems = []
    for task in load_tasks(specs, lambda name: job.inputs[f"dataset/{name}"]):
        problems += [np.array(render(task.conversation(i), tokenizer)[0]) for i in range(len(task))]
    if problems:
        yield Source("rl", [np.concatenate(problems)], True)


def look_through(text: "EvaluationText", source: Source, reading: Counted) -> "dict[int, np.ndarray]":
    """By length of window: the hashes of evaluation text that the source has, sorted.

    The result of each part is kept, so that a stage that was killed resumes at the part it had reached.
    """
    import numpy as np

    from data.durable import put_in_place

    lookups = text.lookups(source.conversations)
    seen = {length: np.zeros(len(lookup.hashes), bool) for length, lookup in lookups.items()}
    for number, part in enumerate(source.parts if lookups else []):
        kept = reading.job.scratch / f"{source.name}-{number}.npz"
        if kept.exists():
            reading.add(len(part), now=source.name)
        else:
            temporary = kept.with_suffix(".tmp.npz")
            np.savez(temporary, **scan(text, lookups, source.name, part, reading))
            put_in_place(temporary, kept)
        with np.load(kept) as places:
            for length in seen:
                seen[length][places[str(length)]] = True
    return {length: lookup.hashes[seen[length]] for length, lookup in lookups.items()}


def scan(
    text: "EvaluationText", lookups: "dict[int, Lookup]", name: str, part: "np.ndarray", reading: Counted
) -> dict[str, Any]:
    """By length: the positions in each lookup of the hashes that a part has."""
    import numpy as np

    from evals.contamination import chunks

    found = {length: np.zeros(len(lookup.hashes), bool) for length, lookup in lookups.items()}
    stretches = list(chunks([part], max(lookups)))
    workers = max(1, reading.job.launch.workers)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(stretches), workers * AHEAD):
            some = stretches[start : start + workers * AHEAD]
            for places in pool.map(lambda stretch: text.scan(stretch, lookups), some):
                for length, which in places.items():
                    found[length][which] = True
            reading.add(sum(len(stretch) for stretch in some), now=name)
    return {str(length): np.flatnonzero(places) for length, places in found.items()}


def describe(
    params: Params,
    text: "EvaluationText",
    sources: list[Source],
    found: dict[str, dict[str, list[int]]],
    texts: dict[str, list[str]],
) -> dict[str, Any]:
    """contamination.json: by task the number of items, of those long enough to look up, and of those in each source."""
    tasks = {}
    for name, items in texts.items():
        where = {source: numbers[name] for source, numbers in found.items() if numbers[name]}
        examples = [
            {"source": source, "text": items[number]}
            for source, numbers in where.items()
            for number in numbers[: params.examples]
        ]
        tasks[name] = {
            "items": len(items),
            "checked": text.checked(name),
            "found": {source: len(numbers) for source, numbers in where.items()},
            "examples": examples,
        }
    return {"ngram": params.ngram, "sources": {source.name: source.tokens for source in sources}, "tasks": tasks}
