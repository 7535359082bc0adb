"""`export`: a model as a folder that other tools load. One format so far: Hugging Face's, for arch: base.

The folder is whole or not there: it is written beside its place and renamed into it.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.find_model import find_model
from pipeline.session import Session
from pipeline.store import Artifact, Store
from pipeline.ui.models import ModelChoice

RESULT_NEUTRAL = "copies finished models"

MARKER = "chatmill.json"  # makes a folder an export: what it was made from, and which files are ours


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: Hugging Face's nanochat model type")
    parser.set_defaults(takes_names=True)


def export(flags: argparse.Namespace, overrides: list[str]) -> int:
    if len(flags.names) != 2:
        raise UserError("needs a model and a folder", "export", "python flows.py export NAME --format hf DIR")
    model = find_model(Session.open(overrides).store, flags.names[0])
    target = Path(flags.names[1]).expanduser().resolve()
    export_hf(model, target)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{model.label} is in {target} ({size / 1e6:.1f} MB): AutoModelForCausalLM.from_pretrained({str(target)!r})")
    return 0


def export_hf(model: ModelChoice, target: Path) -> None:
    """Write `target` as AutoModelForCausalLM and AutoTokenizer read it; an earlier export there is replaced.

    Raises UserError where other files are in the way, ModelError for a model that the format cannot express, Corrupt
    for a damaged one.
    """
    check_target(target)
    model.open()
    artifact = Store.read(model.folder)
    assert artifact is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.making{os.getpid()}")
    old = target.with_name(f".{target.name}.replaced{os.getpid()}")
    aside.mkdir()
    try:
        _write(model, artifact, aside)
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raises UserError if `target` is a file, or a folder that holds anything but an earlier export."""
    if target.exists() and not target.is_dir():
        raise UserError("is a file", str(target), "Name a folder.")
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    record = read_marker(target)
    if record is None and found:
        raise UserError("is not empty, and no earlier export", str(target), "Name a new folder, or empty this one.")
    if record is not None and (others := sorted(found - set(record["files"]) - {MARKER})):
        what = f"holds an earlier export, but also {', '.join(others)}"
        raise UserError(what, str(target), "Move them, or export elsewhere.")


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What an exported folder was made from ("module", "key", "stages") and its "files"; None for other folders."""
    try:
        record = json.loads((folder / MARKER).read_text())
        return record if record["format"] == "hf" and record["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(model: ModelChoice, artifact: Artifact, out: Path) -> None:
    from data.conversation import ASSISTANT
    from data.huggingface import tokenizer_config
    from data.tokenizer import Tokenizer
    from model.gpt import read_config
    from model.huggingface import config_json, export_weights

    config = read_config(model.folder)
    tokenizer = Tokenizer.load(model.tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"has {tokenizer.vocab_size} tokens, the model {config.vocab_size}", str(model.tokenizer))
    ends = [tokenizer.special[ASSISTANT[1]], tokenizer.bos]  # as the engine ends a turn or a text
    described = config_json(config, tokenizer.bos, ends)
    tokens = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(out / "config.json", described)
    _write_json(out / "generation_config.json", tokens)  # a length here would override the caller's
    _write_json(out / "tokenizer_config.json", tokenizer_config(config.sequence_len))
    shutil.copyfile(model.tokenizer / "tokenizer.json", out / "tokenizer.json")
    export_weights(model.folder, out)
    record = {"format": "hf", "module": artifact.module, "key": artifact.key, "stages": artifact.stages}
    _write_json(out / MARKER, record | {"files": sorted(path.name for path in out.iterdir())})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
