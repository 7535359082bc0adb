"""Base weights as Hugging Face's nanochat type and back; without transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small import batch, small_config, small_model

from model.config import GPTConfig
from model.errors import ModelError
from model.huggingface import check_exportable, config_from_json, config_json, obstacles
from model.saved import load_model, write_weights


@pytest.mark.parametrize("settings", [{}, {"kv_heads": 1}, {"rope_theta": 100_000.0}, {"depth": 3, "width": 64}])
def test_a_config_comes_back_as_it_went(settings):
    config = small_config(**settings)

    assert config_from_json(config_json(config, 5, [9, 5])) == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"qk_gain": 1.2}, ["qk_gain=1.2"]),
        ({"lambdas": True, "smear": True}, ["lambdas=true", "smear=true"]),
        ({"value_embeddings": True}, ["value_embeddings=true"]),
        ({"backout": True}, ["backout=true"]),
        ({"sequence_len": 1024, "window_pattern": "SL"}, ["window_pattern=SL"]),
        ({"window_pattern": "SL"}, []),  # a window as wide as the context is none
        (
            {"arch": "modern", "sequence_len": 1024},
            ["qk_gain", "lambdas", "value_embeddings", "backout", "smear", "SSSL"],
        ),
    ],
)
def test_what_cannot_be_exported_is_named_with_each_switch(settings, named):
    config = small_config(**settings)

    found = obstacles(config)

    assert len(found) == len(named) and all(name in " ".join(found) for name in named)
    if named:
        with pytest.raises(ModelError, match="cannot be exported"):
            check_exportable(config, "hf")


def test_modern_weights_with_every_switch_off_are_base_weights():
    off = dict.fromkeys(("lambdas", "value_embeddings", "backout", "smear"), False)

    assert obstacles(GPTConfig("modern", 2, vocab_size=64, qk_gain=1.0, window_pattern="L", **off).resolved()) == []


def test_an_architecture_of_ones_own_cannot_be_exported():
    assert obstacles(small_config(arch="model.gpt.GPT")) == ["arch=model.gpt.GPT"]


@pytest.mark.parametrize(
    "change", [{"model_type": "llama"}, {"final_logit_softcapping": 30.0}, {"tie_word_embeddings": True}]
)
def test_a_config_that_this_model_would_not_follow_is_refused(change):
    with pytest.raises(ModelError, match=next(iter(change))):
        config_from_json(config_json(small_config(), 5, [5]) | change)


def test_a_config_of_something_else_is_refused():
    with pytest.raises(ModelError, match="has model_type='gpt2', expected 'nanochat'"):
        config_from_json({"model_type": "gpt2"})
    with pytest.raises(ModelError, match="is not a complete nanochat config"):
        config_from_json({"model_type": "nanochat"})
    with pytest.raises(ModelError, match="quantised"):
        config_from_json(config_json(small_config(), 5, [5]) | {"quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    "change", [{"eos_token_id": 9}, {"pad_token_id": None, "use_cache": False}, {"dtype": "bfloat16"}]
)
def test_what_fine_tuning_elsewhere_changes_is_taken(change):
    config = small_config()

    assert config_from_json(config_json(config, 5, [9, 5]) | change) == config


def test_nanochat_has_no_other_rope_theta():
    config = small_config(rope_theta=100_000.0)

    assert obstacles(config) == [] and obstacles(config, "nanochat") == ["rope_theta=100000"]


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("hf", {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"}),
        ("nanochat", {"lm_head.weight", "transformer.wte.weight", "transformer.h.1.attn.c_k.weight"}),
    ],
)
def test_weights_come_back_to_the_bit_and_give_the_same_logits(tmp_path, layout, names):
    model = small_model(kv_heads=1)

    write_weights(model.state_dict(), tmp_path, layout)
    (tmp_path / "config.json").write_text(json.dumps(config_json(model.config, 5, [5])))

    assert names <= load_file(tmp_path / "model.safetensors").keys()
    tokens, _ = batch()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), model.eval()(tokens))
