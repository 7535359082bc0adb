"""Formats that `export` writes.

hf        Hugging Face's model type `nanochat`, for transformers, vLLM, TRL, lm-eval
nanochat  nanochat's own names of weights, twice: its base directory (NANOCHAT_BASE_DIR) with a checkpoint that its
          scripts find, for nanochat until the end of 2025; and beside it a folder as mlx-lm reads it

A nanochat checkpoint is a pickle of plain tensors, and its tokenizer a pickle of tiktoken's. They are written for
nanochat, which reads nothing else. Nothing here ever reads a pickle: what comes back is read from model.safetensors and
tokenizer.json.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.exported import Exported
from pipeline.errors import UserError
from pipeline.ui.models import ModelChoice

if TYPE_CHECKING:
    from torch import Tensor

    from data.tokens.tokenizer import Tokenizer
    from model.config import ResolvedConfig
    from model.huggingface import Layout


@dataclass
class Opened:
    """A model in memory. weights: by our names, float32."""

    config: "ResolvedConfig"
    weights: "dict[str, Tensor]"
    tokenizer: "Tokenizer"
    tokenizer_json: Path


def open_model(model: ModelChoice, layout: "Layout") -> Opened:
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


def write_hf(model: ModelChoice, record: Exported, out: Path) -> None:
    _write_folder(open_model(model, "hf"), "hf", out)


def write_nanochat(model: ModelChoice, record: Exported, out: Path) -> None:
    import torch

    from model.huggingface import layout_name

    opened = open_model(model, "nanochat")
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
    _write_json(checkpoint / "meta_000000.json", {"step": 0, "model_config": described})
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
    _write_json(out / "config.json", described)
    _write_json(out / "generation_config.json", tokens)  # a length here would override the caller's
    _write_json(out / "tokenizer_config.json", tokenizer_config(config.sequence_len))
    (out / "tokenizer.json").write_bytes(opened.tokenizer_json.read_bytes())
    write_weights(opened.weights, out, layout)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


# By module; what finetune makes goes to mid_checkpoints or chatsft_checkpoints.
CHECKPOINTS = {"pretrain": "base_checkpoints", "rl": "chatrl_checkpoints"}
WRITERS: dict[str, Callable[[ModelChoice, Exported, Path], None]] = {"hf": write_hf, "nanochat": write_nanochat}
HINTS = {
    "hf": "Load it with AutoModelForCausalLM.from_pretrained('{target}')",
    "nanochat": "Set NANOCHAT_BASE_DIR={target} for nanochat, or --model {target} for mlx-lm",
}
