"""CORE as evaluations run it, in batches, against one question at a time. Weights are random."""

import copy
import statistics
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from data.tokens.tokenizer import Tokenizer
from evals.core import Core, CoreSettings
from evals.core_prompts import Question, TaskItems, encode
from evals.ledger import Ledger
from model.config import GPTConfig
from model.gpt import GPT
from pipeline.bench.data import Stages
from pipeline.bench.decoding import build
from pipeline.bench.registry import Bench, Result, Skipped
from pipeline.bench.timing import seconds_of
from pipeline.runner.environment import user_path

Answers = dict[int, bool]  # by item


def core(bench: Bench) -> Result:
    """items/s by task and of all, bench.items of each. same_answers: the share of items on which both ways agree.

    Both read the same items and take turns. One at a time is a whole forward pass over the options of each item, with
    all of its logits.
    """
    settings = bench.settings
    if settings.bundle is None:
        raise Skipped("needs bench.bundle=FOLDER, or the path of eval_bundle.zip")
    rounds = 1 if settings.tiny else max(1, settings.repeats // 2)
    seconds: dict[str, list[tuple[float, float]]] = {}  # by task and round: in batches, one at a time
    agreeing: dict[str, list[bool]] = {}  # by task and item
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        stages = Stages(Path(folder))
        tok = Tokenizer.load(stages.tokenizer(settings, stages.text(settings.data)))
        batch_tokens = bench.choose(tiny=2_048, cpu=2_048, cuda=65_536)  # on GPUs as evaluations use
        core_settings = CoreSettings(settings.items, batch_tokens, settings.threads or 1)
        whole = Core(_unpacked(user_path(settings.bundle), stages.root), core_settings)
        usual = GPTConfig(depth=4, vocab_size=tok.vocab_size)
        tiny = GPTConfig(depth=2, width=32, head_dim=16, vocab_size=tok.vocab_size, sequence_len=256)
        model = build(bench.choose(tiny, usual, usual), bench.device)
        for number in range(rounds):
            for items in whole.tasks:
                label, one_task, alone = items.task.label, copy.copy(whole), Answers()
                one_task.tasks = [items]
                ledger = Ledger(stages.root / f"ledger-{number}-{label}")
                in_batches = partial(one_task.measure, model, tok, ledger, lambda: None, lambda count, what: None)
                batched = seconds_of(in_batches, bench.device)
                single = seconds_of(partial(_one_at_a_time, model, tok, items, alone), bench.device)
                seconds.setdefault(label, []).append((batched, single))
                answers = dict(
                    pair for record in ledger.records[f"core/{label}"].values() for pair in record["answers"]
                )
                agreeing[label] = [answers[index] == right for index, right in alone.items()]
    result: Result = {}
    for name, labels in [*((label, [label]) for label in seconds), ("all tasks", list(seconds))]:
        sums = [[sum(seconds[label][number][way] for label in labels) for number in range(rounds)] for way in (0, 1)]
        batched, single = map(statistics.median, sums)
        agree = [same for label in labels for same in agreeing[label]]
        result[name] = {
            "items": len(agree),
            "items_s": len(agree) / batched,
            "one_at_a_time_items_s": len(agree) / single,
            "times_one": single / batched,
            "same_answers": sum(agree) / len(agree),
        }
    return result


def _unpacked(bundle: Path, folder: Path) -> Path:
    if bundle.suffix != ".zip":
        return bundle
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder / "bundle")
    return folder / "bundle"


def _one_at_a_time(model: GPT, tok: Tokenizer, items: TaskItems, answers: Answers) -> None:
    for index in range(items.count):
        (question,) = encode(items, [index], tok, model.config.sequence_len)
        answers[index] = _is_right(model, question, exact=items.task.kind == "language_modeling")


@torch.inference_mode()
def _is_right(model: GPT, question: Question, exact: bool) -> bool:
    """Return True if the model answers right, by one forward pass over the question's options."""
    width = max(len(option.ids) for option in question.options)
    tokens = torch.tensor([option.ids + [0] * (width - len(option.ids)) for option in question.options])
    logits = model(tokens.to(model.lm_head.weight.device)).cpu()
    losses = []
    for row, option in enumerate(question.options):
        predicted = logits[row, option.start - 1 : option.end - 1].float()
        targets = tokens[row, option.start : option.end]
        if exact:
            return bool((predicted.argmax(-1) == targets).all())
        losses.append(float(F.cross_entropy(predicted, targets)))
    return losses.index(min(losses)) == question.gold
