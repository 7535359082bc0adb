"""`export`: writes a model as a folder that other tools load.

hf        Hugging Face's model type `nanochat`, for transformers, vLLM, TRL, lm-eval
nanochat  nanochat's own names of weights, twice: its base directory (NANOCHAT_BASE_DIR) with a checkpoint that its
          scripts find, for nanochat until the end of 2025; and beside it a folder as mlx-lm reads it

A nanochat checkpoint is a pickle of plain tensors, and its tokenizer a pickle of tiktoken's. They are written for
nanochat, which reads nothing else. Nothing here ever reads a pickle: what is read back is model.safetensors and
tokenizer.json.
"""

import json
import os
import pickle
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.durable import write_json
from pipeline.artifacts.artifact import MARKER, Exported, read_marker
from pipeline.artifacts.store import Store
from pipeline.commands.find_model import TRUST_CODE, find_model
from pipeline.commands.parser import Parser
from pipeline.errors import UserError
from pipeline.numbers import data_size, plural
from pipeline.plan.session import Session
from pipeline.printing import say
from pipeline.runner.environment import user_path
from pipeline.ui.models import ModelChoice

if TYPE_CHECKING:
    from torch import Tensor

    from data.tokens.tokenizer import Tokenizer
    from model.config import ResolvedConfig
    from model.huggingface import Layout

CONFIG = "config.json"  # no tool loads a folder without it
HINTS = {
    "hf": "Load it with AutoModelForCausalLM.from_pretrained('{target}')",
    "nanochat": "Set NANOCHAT_BASE_DIR={target} for nanochat, or --model {target} for mlx-lm",
}
# By module. Models of finetune go to mid_checkpoints or chatsft_checkpoints.
CHECKPOINTS = {"pretrain": "base_checkpoints", "rl": "chatrl_checkpoints"}


def export(arguments: list[str]) -> int:
    parser = Parser("export", "MODEL DIR", least=2, most=2)
    formats = "hf: for transformers, vLLM, TRL. nanochat: for nanochat of 2025 and mlx-lm"
    parser.add_argument("--format", choices=list(HINTS), default="hf", help=formats)
    parser.flag("--trust-code", help=TRUST_CODE)
    flags = parser.parse(arguments)
    model, why = find_model(Session.open(flags.overrides), flags.overrides, flags.names[0], flags.trust_code)
    say(f"Model: {model.label}, {why}")
    target = user_path(flags.names[1]).resolve()
    earlier = write(model, target, flags.format)
    if earlier is not None:
        replaced = f"the export of {earlier.stages[0]} {earlier.key} in {target}"
        say(f"Replaced {replaced} ({plural(len(earlier.files), 'file')})")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    say(f"Exported to {target} ({data_size(size)}). {HINTS[flags.format].format(target=target)}")
    return 0


def write(model: ModelChoice, target: Path, format: str = "hf") -> Exported | None:
    """Write `target` in the format. An earlier export there is replaced, and returned; other files stay.

    Raises UserError if other files are in the way, ModelError for a model that the format cannot express, Corrupt for a
    damaged one.
    """
    earlier = check_target(target)
    folder, _ = model.open()
    origin = Store.read(folder) if model.store else read_marker(folder)
    stages = origin.stages if origin else [model.label]
    record = Exported(format, origin.module if origin else "", origin.key if origin else "", stages)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    try:
        (_write_nanochat if format == "nanochat" else _write_hf)(model, record, made)
        ours = {MARKER, *(file.split("/")[0] for file in earlier.files)} if earlier else set()
        if taken := sorted(p.name for p in made.iterdir() if (target / p.name).exists() and p.name not in ours):
            what = f"holds files of yours that the export would replace: {', '.join(taken)}"
            raise UserError(what, str(target), "Move them, or export elsewhere.")
        _put(made, target, record)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return earlier


def check_target(target: Path) -> Exported | None:
    """The earlier export in `target`, if there is one. Raises UserError for a file, or a folder with other contents."""
    if target.exists() and not target.is_dir():
        raise UserError("is a file", str(target), "Name a folder.")
    earlier = read_marker(target)
    if earlier is None and target.is_dir() and any(target.iterdir()):
        raise UserError("is neither empty nor an earlier export", str(target), "Name a new folder, or empty this one.")
    return earlier


def _put(made: Path, target: Path, record: Exported) -> None:
    """Move the files in `made` to `target`, replacing those of an earlier export. Other files stay as they are.

    After an interruption the folder cannot be loaded, as config.json comes last, and its marker still lists our files.
    """
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    earlier = read_marker(target)
    old = earlier.files if earlier else []
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / MARKER, asdict(record) | {"files": sorted({*old, *names})})
    (target / CONFIG).unlink(missing_ok=True)
    for name in set(old) - set(names):
        path = target / name
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other files are in its folder
            while (path := path.parent) != target:
                path.rmdir()
    for name in sorted(names, key=lambda name: name == CONFIG):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, target / name)
    write_json(target / MARKER, asdict(record) | {"files": names})


# --- formats


@dataclass
class Opened:
    """A model in memory. weights: by our names, float32."""

    config: "ResolvedConfig"
    weights: "dict[str, Tensor]"
    tokenizer: "Tokenizer"
    tokenizer_json: Path


def _open(model: ModelChoice, layout: "Layout") -> Opened:
    """Raises ModelError for a model that the layout cannot express."""
    from data.tokens.tokenizer import Tokenizer
    from model.huggingface import check_exportable
    from model.saved import load_model, read_config

    config = read_config(model.folder)
    check_exportable(config, layout)
    tokenizer = Tokenizer.load(model.tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"has {tokenizer.vocab_size} tokens, the model {config.vocab_size}", str(model.tokenizer))
    return Opened(config, load_model(model.folder).state_dict(), tokenizer, model.tokenizer / "tokenizer.json")


def _write_hf(model: ModelChoice, record: Exported, out: Path) -> None:
    _write_folder(_open(model, "hf"), "hf", out)


def _write_nanochat(model: ModelChoice, record: Exported, out: Path) -> None:
    import torch

    from model.huggingface import layout_name

    opened = _open(model, "nanochat")
    config = opened.config
    _write_folder(opened, "nanochat", out)
    checkpoint = out / CHECKPOINTS.get(record.module, "chatsft_checkpoints") / f"d{config.depth}"
    if record.module == "finetune" and record.stages[0].startswith("mid"):
        checkpoint = out / "mid_checkpoints" / f"d{config.depth}"
    checkpoint.mkdir(parents=True)
    named = {layout_name(name, "nanochat"): weight for name, weight in opened.weights.items()}
    torch.save(named, checkpoint / "model_000000.pt")
    described = {
        "sequence_len": config.sequence_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_kv_head": config.kv_heads,
        "n_embd": config.width,
    }
    _write_text(checkpoint / "meta_000000.json", {"step": 0, "model_config": described})
    (out / "tokenizer").mkdir()
    (out / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(opened.tokenizer.encoding))
    torch.save(torch.from_numpy(opened.tokenizer.token_bytes), out / "tokenizer" / "token_bytes.pt")


def _write_folder(opened: Opened, layout: "Layout", out: Path) -> None:
    """config.json, the tokenizer and model.safetensors, with the layout's names of weights."""
    from data.chat.conversation import ASSISTANT
    from data.chat.template import tokenizer_config
    from model.huggingface import config_json
    from model.saved import write_weights

    tokenizer, config = opened.tokenizer, opened.config
    ends = [tokenizer.special[ASSISTANT[1]], tokenizer.bos]  # as the engine ends a turn or a text
    described = config_json(config, tokenizer.bos, ends)
    tokens = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if layout == "nanochat":
        described["rope_theta"] = config.rope_theta  # where mlx-lm looks for it
    _write_text(out / CONFIG, described)
    _write_text(out / "generation_config.json", tokens)  # a length here would override the caller's
    _write_text(out / "tokenizer_config.json", tokenizer_config(config.sequence_len))
    (out / "tokenizer.json").write_bytes(opened.tokenizer_json.read_bytes())
    write_weights(opened.weights, out, layout)


def _write_text(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
