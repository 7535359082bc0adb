"""A store with a tokenizer, its tokens and models that were never trained, as a run would leave them."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from data.durable import file_sha256
from data.tokens import bpe
from model.config import GPTConfig
from model.gpt import new_model
from model.saved import write_config
from pipeline.artifacts.store import Artifact, Store
from pipeline.plan.session import Session
from pipeline.ui.models import MODULES, ModelChoice, choice

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 400
SIZES = {"depth": 2, "width": 32, "head_dim": 16, "sequence_len": 128}


def small_store(root: Path) -> Store:
    """Artifacts tokenizer, tokenize, pretrain, and sft, which comes from pretrain."""
    store = Store(root)
    texts = [text for path in sorted((ROOT / "data").rglob("*.py")) if (text := path.read_text())]
    folder = put(store, "tokenizer", "tokenizer").folder
    tokenizer = bpe.save(bpe.train(texts, VOCAB), folder)
    seal(folder)
    folder = put(store, "tokenize", "tokenize", tokenizer="tokenizer").folder
    stream = np.array([token for text in texts[:2] for token in [tokenizer.bos, *tokenizer.encode(text)]], np.uint16)
    np.save(folder / "v.tokens.npy", stream)
    shard = {"name": "v", "split": "val", "tokens": len(stream), "documents": 2, "sha256": ""}
    described = {"dtype": "uint16", "bos": tokenizer.bos, "vocab_size": VOCAB, "shards": [shard]}
    (folder / "tokens.json").write_text(json.dumps(described))
    seal(folder)
    put_model(store, "pretrain", "pretrain", {"tokens": "tokenize"})
    put_model(store, "finetune", "sft", {"model": "pretrain"})
    return store


def put_model(store: Store, module: str, stage: str, inputs: dict[str, str], **settings: Any) -> Artifact:
    """Weights drawn by the stage's name; settings: of GPTConfig, over SIZES."""
    artifact = put(store, module, stage, tokenizer="tokenizer", **inputs)
    model = new_model(GPTConfig(**(SIZES | settings)).resolved(VOCAB), seed=0)
    generator = torch.Generator().manual_seed(len(stage))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_file(model.state_dict(), artifact.folder / "model.safetensors")
    write_config(model.config, artifact.folder)
    return seal(artifact.folder)


def model_of(store: Store, name: str) -> ModelChoice:
    """The model of a stage."""
    return choice(store, store.find_by_name(name, MODULES))


def session_of(store: Store, *overrides: str) -> Session:
    """What a command with these overrides opens on the store."""
    return Session.open([f"store.root={store.root}", *overrides])


def put(store: Store, module: str, stage: str, **inputs: str) -> Artifact:
    """An artifact with a record and no files; inputs are named by stage."""
    folder = store.folder(module, key_of(stage))
    folder.mkdir(parents=True)
    record = {
        "module": module,
        "key": key_of(stage),
        "stages": [stage],
        "inputs": {name: key_of(made) for name, made in inputs.items()},
        "run": "20261122-184000-ab12",
        "finished": time.time(),
        "files": {},
    }
    (folder / "artifact.json").write_text(json.dumps(record))
    return Artifact(folder, record)


def seal(folder: Path) -> Artifact:
    """List the files that are there in the record."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.iterdir()
        if path.name != "artifact.json"
    }
    record = json.loads((folder / "artifact.json").read_text()) | {"files": files}
    (folder / "artifact.json").write_text(json.dumps(record))
    return Artifact(folder, record)


def key_of(stage: str) -> str:
    return stage.encode().hex().ljust(16, "0")[:16]
