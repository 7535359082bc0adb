"""The models of a store to chat with, what to ask them, and which of them is loaded."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import read_fields, read_json
from data.trust import fits
from model.config import GPTConfig, ResolvedConfig
from model.errors import ModelError
from pipeline.artifacts.store import Artifact, Store
from pipeline.errors import Corrupt, UserError
from pipeline.numbers import count
from pipeline.ui.chat import ChatSession

CHAT_MODULES = ("finetune", "rl")
MODULES = (*CHAT_MODULES, "pretrain")
PROMPTS = ("Who are you?", "What is 37 + 58?", "How do you spell banana?", "Why is the sky blue?")
TEXTS = ("Once upon a time", "The capital of France is", "To make bread, first", "In the beginning")
RESULTS: dict[str, Any] = {"conversations": [], "samples": []}  # of results.json, which may be from elsewhere
ASKED = {"task": "", "prompt": ""}
PROMPT_CHARACTERS = 120  # longer ones do not fit on a button


@dataclass(frozen=True)
class ModelChoice:
    """A model to chat with: its artifact's folder, its tokenizer's, and what to show of it.

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
    """Every model of the store: the newest chat model first, base models last."""
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
    """The artifact as a ModelChoice. there: all artifacts of the store, where they have been read already.

    Raises UserError if the artifact is not a model, or its tokenizer is gone; Corrupt if its model.json is damaged.
    """
    where = f"{artifact.module}/{artifact.key}"
    if not (artifact.folder / "model.json").is_file():
        raise UserError("is not a model", where, "Run `ls` to see what the store holds.")
    tokenizer = store.folder("tokenizer", str(artifact.record["inputs"].get("tokenizer", "")))
    if Store.read(tokenizer) is None:
        raise UserError(f"its tokenizer {tokenizer} is missing", where, "Run the pipeline again to make it.")
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


def describe(config: ResolvedConfig, base: bool) -> str:
    """A model in one line. base: it was not trained to chat."""
    size = f"{count(config.num_params())} parameters"
    parts = [size, f"{config.depth} layers", f"{config.sequence_len:,} tokens of context"]
    if base:
        parts.append("base model: continues text only")
    return " · ".join(parts)


def _prompts(store: Store, artifact: Artifact, there: list[Artifact]) -> tuple[str, ...]:
    """Prompts that show the model at its best: from its evaluation, a correctly answered question of each task, or the
    texts that a base model continued; else the usual ones."""
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


class Sessions:
    """The models to choose from. One is loaded at a time, since they are large. A replaced one finishes its answer."""

    def __init__(
        self, models: Sequence[ModelChoice], device: str = "auto", load: Callable[..., ChatSession] = ChatSession.load
    ):
        if not models:
            raise UserError("the store has no model to chat with", fix="Run `python flows.py` to train one.")
        self.models = list(models)
        self._device, self._load = device, load
        self._loaded: tuple[str, ChatSession] | None = None
        self._lock = threading.Lock()

    def choice(self, key: str | None) -> ModelChoice:
        """The model whose key starts with `key`; the first one for None. Raises UserError."""
        if not key:
            return self.models[0]
        for model in self.models:
            if model.key.startswith(key):
                return model
        raise UserError(f"there is no model {key!r}", "model")

    def get(self, key: str | None) -> ChatSession:
        """The session of that model, which replaces another one in memory."""
        model = self.choice(key)
        with self._lock:
            if self._loaded is None or self._loaded[0] != model.key:
                self._loaded = None
                try:
                    folders = model.open()
                except Corrupt as error:
                    raise UserError(str(error)) from None
                self._loaded = (model.key, self._load(*folders, self._device))
            return self._loaded[1]
