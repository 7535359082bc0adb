"""Which models of a store can be talked to, and what to ask them."""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import read_fields, read_json
from data.trust import fits
from model.config import GPTConfig
from model.errors import ModelError
from pipeline.artifacts.store import Artifact, Store
from pipeline.errors import Corrupt, UserError

CHAT_MODULES = ("finetune", "rl")
MODULES = (*CHAT_MODULES, "pretrain")
PROMPTS = ("Who are you?", "What is 37 + 58?", "How do you spell banana?", "Why is the sky blue?")
TEXTS = ("Once upon a time", "The capital of France is", "To make bread, first", "In the beginning")
RESULTS: dict[str, Any] = {"conversations": [], "samples": []}  # of results.json, which may be from elsewhere
ASKED = {"task": "", "prompt": ""}
PROMPT_CHARACTERS = 120  # longer ones do not fit on a button


@dataclass(frozen=True)
class ModelChoice:
    """A model to talk to: its artifact's folder, its tokenizer's, and what to show of it.

    store: the one that the folders belong to; None if they are not artifacts.
    """

    label: str
    key: str
    folder: Path
    tokenizer: Path
    facts: str = ""  # one line: size, context, when it was made
    prompts: tuple[str, ...] = PROMPTS
    store: Store | None = None

    def open(self) -> tuple[Path, Path]:
        """The folders of the model and its tokenizer, for reading. Raises Corrupt if a file is damaged."""
        for folder in (self.folder, self.tokenizer):
            if self.store is not None and (artifact := Store.read(folder)):
                self.store.open(artifact)
        return self.folder, self.tokenizer


def find_models(store: Store) -> list[ModelChoice]:
    """Every model of the store: the newest chat model first, those that only continue text last."""
    choices, there = [], list(store.all())
    for artifact in sorted(there, key=lambda a: a.module not in CHAT_MODULES):
        if artifact.module in MODULES:
            try:
                choices.append(choice(store, artifact, there))
            except UserError:
                continue
            except Corrupt as error:
                logging.getLogger(__name__).warning("%s", error)
    return choices


def choice(store: Store, artifact: Artifact, there: list[Artifact] | None = None) -> ModelChoice:
    """there: what is in the store, where that is known.

    Raises UserError if the artifact is no model, or its tokenizer is gone; Corrupt if its model.json is damaged.
    """
    where = f"{artifact.module}/{artifact.key}"
    if not (artifact.folder / "model.json").is_file():
        raise UserError("is no model to talk to", where, "`ls` shows what the store holds.")
    tokenizer = store.folder("tokenizer", str(artifact.record["inputs"].get("tokenizer", "")))
    if Store.read(tokenizer) is None:
        raise UserError(f"its tokenizer {tokenizer} is not there", where, "Run the pipeline once more to make it.")
    name = str(artifact.record.get("run_name") or "")
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(artifact.record["finished"]))
    label = " · ".join(part for part in (artifact.stages[0], name, artifact.key[:8]) if part)
    facts = f"{_facts(store, artifact)} · made {made}"
    prompts = _prompts(store, artifact, list(store.all()) if there is None else there)
    return ModelChoice(label, artifact.key, artifact.folder, tokenizer, facts, prompts, store)


def _facts(store: Store, artifact: Artifact) -> str:
    path = store.open(artifact, "model.json") / "model.json"
    try:
        config = GPTConfig.from_json(read_json(path, dict) or {})
    except ModelError as error:
        raise UserError(str(error), str(path)) from None
    return describe(config, artifact.module == "pretrain")


def describe(config: GPTConfig, base: bool) -> str:
    """A model in one line. base: it was not taught to chat."""
    size = f"{_count(config.num_params())} parameters"
    parts = [size, f"{config.depth} layers", f"{config.sequence_len:,} tokens of context"]
    if base:
        parts.append("base model: continues text only")
    return " · ".join(parts)


def _count(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:g}"


def _prompts(store: Store, artifact: Artifact, there: list[Artifact]) -> tuple[str, ...]:
    """What the model was seen to do well: a question of each task that its evaluation saw answered rightly, or the
    texts that a base model continued there; the usual ones where there is nothing."""
    found: dict[str, str] = {}
    base = artifact.module == "pretrain"
    for results in _evaluations(store, artifact.key, there):
        for conversation in results["conversations"]:
            if fits(conversation, ASKED) and conversation.get("correct") and _fits(conversation["prompt"]):
                found.setdefault(conversation["task"], conversation["prompt"])
        for sample in results["samples"] if base else []:
            if fits(sample, {"prompt": ""}):
                found.setdefault(sample["prompt"], sample["prompt"])
    usual = TEXTS if base else PROMPTS
    return tuple(dict.fromkeys([*list(found.values())[:3], *usual]))[: len(usual)]


def _fits(prompt: str) -> bool:
    return "\n" not in prompt.strip() and len(prompt) <= PROMPT_CHARACTERS


def _evaluations(store: Store, key: str, there: list[Artifact]) -> Iterator[dict[str, Any]]:
    for artifact in there:
        if artifact.module == "evaluate" and artifact.record["inputs"].get("model") == key:
            with suppress(Corrupt):
                yield read_fields(store.open(artifact, "results.json") / "results.json", RESULTS)
