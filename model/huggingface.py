"""Base weights as Hugging Face's `nanochat` model type, there and back: its config.json and its names of weights."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import GPTConfig
from model.errors import ModelError
from model.functional import EPS
from model.gpt import SOFTCAP

MODEL_TYPE = "nanochat"
WEIGHTS = "model.safetensors"
HEAD = "lm_head."  # of both; every other weight lies under PREFIX there
PREFIX = "model."


def obstacles(config: GPTConfig) -> list[str]:
    """What this model has that the type cannot express, as settings with their values; empty if it can be exported.

    `modern` is nothing but switches: with those listed here off, its weights are exportable too.
    """
    found = [] if config.arch in ("base", "modern") else [f"arch={config.arch}"]
    if config.qk_gain != 1.0:
        found.append(f"qk_gain={config.qk_gain:g}")
    found += [f"{name}=true" for name in ("lambdas", "value_embeddings", "backout", "smear") if getattr(config, name)]
    if min(config.windows()) < config.sequence_len:
        found.append(f"window_pattern={config.window_pattern}")
    return found


def config_json(config: GPTConfig, bos: int, ends: list[int]) -> dict[str, Any]:
    """config.json of a resolved config. bos, ends: ids of the token a text starts with, and of those that end one.

    Raises ModelError naming the switches that are in the way.
    """
    if found := obstacles(config):
        raise ModelError(
            f"Hugging Face's {MODEL_TYPE} type has no {', '.join(found)}: these weights cannot be exported. "
            f"What can is trained with model=base, or with these switches off"
        )
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.sequence_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "relu2",
        "rms_norm_eps": EPS,
        "final_logit_softcapping": SOFTCAP,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": ends,
        "pad_token_id": bos,
    }


def config_from_json(values: dict[str, Any]) -> GPTConfig:
    """The resolved config that config_json describes. Raises ModelError for anything it does not write."""
    try:
        rope = values["rope_parameters"]
        config = GPTConfig(
            depth=values["num_hidden_layers"],
            width=values["hidden_size"],
            head_dim=values["hidden_size"] // values["num_attention_heads"],
            kv_heads=values["num_key_value_heads"],
            vocab_size=values["vocab_size"],
            sequence_len=values["max_position_embeddings"],
            rope_theta=rope["rope_theta"],
        ).resolved()
        expected = config_json(config, values["bos_token_id"], values["eos_token_id"])
        wrong = [name for name in expected if name not in _FREE and values.get(name) != expected[name]]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"is no config.json of the {MODEL_TYPE} type ({type(error).__name__}: {error})") from error
    if wrong:
        shown = ", ".join(f"{name}={values.get(name)!r}" for name in wrong)
        raise ModelError(f"is a config.json that this project's model cannot follow: {shown}")
    return config


_FREE = ("architectures", "dtype", "use_cache", "attention_dropout", "pad_token_id")  # whatever they say, logits agree


def export_weights(model: Path, out: Path) -> None:
    """`model`'s weights (an artifact's folder) under the type's names in `out`, in the dtype they have."""
    weights = load_file(model / WEIGHTS)
    named = {name if name.startswith(HEAD) else PREFIX + name: weight for name, weight in weights.items()}
    save_file(named, out / WEIGHTS, {"format": "pt"})
    (out / WEIGHTS).chmod(0o644)  # safetensors keeps what it writes to its owner


def import_weights(exported: Path, out: Path) -> None:
    """The inverse of export_weights. Raises ModelError for a folder without weights in one file."""
    try:
        weights = load_file(exported / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{exported} has no {WEIGHTS} that can be read: {error}") from error
    save_file({name.removeprefix(PREFIX): weight for name, weight in weights.items()}, out / WEIGHTS)
