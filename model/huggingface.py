"""Base weights in the layouts of other tools, there and back: config.json and the names of weights.

Two sets of names are in use for the same model type, `nanochat`: those of transformers, and nanochat's own, which
mlx-lm reads too.
"""

from typing import Any, Literal

from model.config import GPTConfig, ResolvedConfig
from model.errors import ModelError
from model.gpt import SOFTCAP
from model.kernels.autograd import EPS

MODEL_TYPE = "nanochat"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head."  # in all of them; every other weight is under PREFIX in transformers
PREFIX = "model."
NANOCHAT = {
    "embed_tokens.": "transformer.wte.",
    "layers.": "transformer.h.",
    ".self_attn.q_proj.": ".attn.c_q.",
    ".self_attn.k_proj.": ".attn.c_k.",
    ".self_attn.v_proj.": ".attn.c_v.",
    ".self_attn.o_proj.": ".attn.c_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
ROPE_THETA = 10_000.0  # fixed in nanochat's own code

Layout = Literal["hf", "nanochat"]


def obstacles(config: ResolvedConfig, layout: Layout = "hf") -> list[str]:
    """Settings of this model, with their values, that the layout cannot express; empty if it can be exported.

    `modern` is nothing but switches: with those listed here off, its weights are exportable too.
    """
    found = [] if config.arch in ("base", "modern") else [f"arch={config.arch}"]
    if config.qk_gain != 1.0:
        found.append(f"qk_gain={config.qk_gain:g}")
    found += [f"{name}=true" for name in ("lambdas", "value_embeddings", "backout", "smear") if getattr(config, name)]
    if min(config.windows()) < config.sequence_len:
        found.append(f"window_pattern={config.window_pattern}")
    if layout == "nanochat" and config.rope_theta != ROPE_THETA:
        found.append(f"rope_theta={config.rope_theta:g}")
    return found


def check_exportable(config: ResolvedConfig, layout: Layout) -> None:
    """Raises ModelError naming the switches that are in the way."""
    if found := obstacles(config, layout):
        whose = "Hugging Face's nanochat type" if layout == "hf" else "nanochat"
        raise ModelError(
            f"{whose} has no {', '.join(found)}: these weights cannot be exported. "
            "Train with model=base, or with these switches off"
        )


def config_json(config: ResolvedConfig, bos: int, ends: list[int]) -> dict[str, Any]:
    """config.json of a resolved config. bos, ends: ids of the token a text starts with, and of those that end one."""
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


# Fields of config.json that may differ or be missing, since they do not affect logits.
_FREE = ("architectures", "dtype", "use_cache", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id")


def config_from_json(values: dict[str, Any]) -> ResolvedConfig:
    """The resolved config that a config.json of the type describes, whoever wrote it. Raises ModelError."""
    if values.get("model_type") != MODEL_TYPE:
        raise ModelError(f"has model_type={values.get('model_type')!a:.80}, expected {MODEL_TYPE!r}")
    if "quantization_config" in values:
        raise ModelError("describes quantised weights. Export or save them in a floating-point type")
    try:
        config = GPTConfig(
            depth=values["num_hidden_layers"],
            width=values["hidden_size"],
            head_dim=values["hidden_size"] // values["num_attention_heads"],
            kv_heads=values["num_key_value_heads"],
            vocab_size=values["vocab_size"],
            sequence_len=values["max_position_embeddings"],
            rope_theta=values["rope_parameters"]["rope_theta"],
        ).resolved()
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"is not a complete {MODEL_TYPE} config ({type(error).__name__}: {error})") from None
    expected = config_json(config, 0, [])
    if wrong := [name for name in expected if name not in _FREE and values.get(name) != expected[name]]:
        shown = ", ".join(f"{name}={values.get(name)!a:.80}" for name in wrong)
        raise ModelError(f"describes a model that Chatmill does not support: {shown}")
    return config


def layout_name(name: str, layout: Layout) -> str:
    """Our name of a weight in another tool's layout."""
    if layout == "hf":
        return name if name.startswith(HEAD) else PREFIX + name
    for own, theirs in NANOCHAT.items():
        name = name.replace(own, theirs, 1)
    return name


def own_name(name: str) -> str:
    """The inverse of layout_name, for names of any layout, ours included."""
    name = name.removeprefix(PREFIX)
    if name.startswith("transformer."):
        for own, theirs in NANOCHAT.items():
            name = name.replace(theirs, own, 1)
    return name
