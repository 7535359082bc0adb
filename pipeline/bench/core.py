"""CORE in batches against one question at a time, on a bundle's own items: items/s of both, and whether they agree.

Both read the same texts, tokenizer included. One at a time is a whole forward pass over the options of each item, with
all of its logits; in batches is evals.core, as evaluations run it. They take turns. Random weights: only times and
agreement mean anything.
"""

import copy
import statistics
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench import decode
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, Skipped
from pipeline.bench.text import Stages
from pipeline.bench.timing import seconds_of
from pipeline.runner.environment import user_path

if TYPE_CHECKING:
    from data.tokens.tokenizer import Tokenizer
    from evals.core import Core
    from evals.core_prompts import Question, TaskItems
    from evals.ledger import Ledger
    from model.gpt import GPT


BATCH_TOKENS = {"cuda": 65_536}  # as evaluations take
CPU_BATCH_TOKENS = 2_048
Answers = dict[str, dict[int, bool]]  # by task and item


def measure(bench: Bench) -> Result:
    """By task, and of all. bench.items: of each task."""
    from data.tokens.tokenizer import Tokenizer
    from evals.core import Core, CoreSettings

    settings = bench.settings
    if settings.bundle is None:
        raise Skipped("needs bench.bundle=FOLDER, or the path of eval_bundle.zip")
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        params = {"vocab_size": 512, "max_chars": 200_000} if settings.tiny else {"vocab_size": settings.vocab_size}
        tok = Tokenizer.load(stages.run("tokenizer", params, {"text": stages.text(settings.data)}))
        batch_tokens = BATCH_TOKENS.get(bench.device.type, CPU_BATCH_TOKENS)
        core_settings = CoreSettings(settings.items, batch_tokens, settings.threads or 1)
        core = Core(unpacked(user_path(settings.bundle), Path(folder)), core_settings)
        model = decode.build(case(tok, settings.tiny), bench.device)
        paths = Paths(core, model, tok, Path(folder))
        rounds = [paths.round(bench, number) for number in range(1 if settings.tiny else max(1, settings.repeats // 2))]
    result: Result = {label: rates(paths, rounds, [label]) for label in rounds[0]}
    result["all tasks"] = rates(paths, rounds, list(rounds[0]))
    return result


def case(tok: "Tokenizer", tiny: bool) -> decode.Case:
    if tiny:
        return decode.Case(2, tok.vocab_size, 256, (1,), 1, width=32, head_dim=16)
    return decode.Case(4, tok.vocab_size, 2048, (1,), 1)


def unpacked(bundle: Path, folder: Path) -> Path:
    if bundle.suffix != ".zip":
        return bundle
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder / "bundle")
    return folder / "bundle"


@dataclass
class Paths:
    """Both ways through the same items, and what they answered last."""

    core: "Core"
    model: "GPT"
    tok: "Tokenizer"
    folder: Path

    def __post_init__(self) -> None:
        self.batched: Answers = {}
        self.single: Answers = {}

    def round(self, bench: Bench, number: int) -> dict[str, tuple[float, float]]:
        """Seconds by task: in batches, one at a time."""
        from evals.ledger import Ledger

        found = {}
        for items in self.core.tasks:
            label = items.task.label
            ledger = Ledger(self.folder / f"ledger-{number}-{label}")
            batched = seconds_of(partial(self.in_batches, label, ledger), bench.device)
            single = seconds_of(partial(self.one_at_a_time, items), bench.device)
            found[label] = (batched, single)
        return found

    def in_batches(self, label: str, ledger: "Ledger") -> None:
        one = copy.copy(self.core)
        one.tasks = [items for items in self.core.tasks if items.task.label == label]
        one.measure(self.model, self.tok, ledger, lambda: None, lambda count, what: None)
        records = ledger.records[f"core/{label}"].values()
        self.batched[label] = {index: bool(right) for record in records for index, right in record["answers"]}

    def one_at_a_time(self, items: "TaskItems") -> None:
        from evals.core_prompts import encode

        exact = items.task.kind == "language_modeling"
        answers = {}
        for index in range(items.count):
            (question,) = encode(items, [index], self.tok, self.model.config.sequence_len)
            answers[index] = answer_alone(self.model, question, exact)
        self.single[items.task.label] = answers

    def agreeing(self, labels: list[str]) -> float:
        same = [self.batched[label][i] == right for label in labels for i, right in self.single[label].items()]
        return sum(same) / len(same)


def answer_alone(model: "GPT", question: "Question", exact: bool) -> bool:
    """Whether the model answers one question right, by a forward pass over its options."""
    import torch

    width = max(len(option.ids) for option in question.options)
    tokens = torch.tensor([option.ids + [0] * (width - len(option.ids)) for option in question.options])
    losses = []
    with torch.inference_mode():
        logits = model(tokens.to(model.lm_head.weight.device)).cpu()
        for row, option in enumerate(question.options):
            said = logits[row, option.start - 1 : option.end - 1].float()
            targets = tokens[row, option.start : option.end]
            if exact:
                return bool((said.argmax(-1) == targets).all())
            losses.append(float(torch.nn.functional.cross_entropy(said, targets)))
    return losses.index(min(losses)) == question.gold


def rates(paths: Paths, rounds: list[dict[str, tuple[float, float]]], labels: list[str]) -> dict[str, Any]:
    batched, single = (statistics.median(sum(one[label][way] for label in labels) for one in rounds) for way in (0, 1))
    items = sum(len(paths.single[label]) for label in labels)
    return {
        "items": items,
        "items_s": items / batched,
        "one_at_a_time_items_s": items / single,
        "times_one": single / batched,
        "same_answers": paths.agreeing(labels),
    }
