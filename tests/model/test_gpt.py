import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from small import batch, small_config, small_model
from torch.nn import functional as F

from model.config import MODERN, GPTConfig
from model.decoding.kvcache import KVCache
from model.errors import ModelError
from model.gpt import GPT, Linear, new_model
from model.saved import load_model, write_config

ALL_ON = {"arch": "modern", "depth": 4, "sequence_len": 160, "kv_heads": 1}


def reference_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The architecture as the published descriptions say it, one row and one head at a time, in float64."""
    config, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    norm = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    angle = torch.arange(tokens.size(1)).double()[:, None] * frequency

    def rotated(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() + b * angle.sin(), -a * angle.sin() + b * angle.cos()], -1)

    def row_logits(row):
        x = norm(w["embed_tokens.weight"][row])
        if config.smear:
            gate = w["smear_lambda"] * torch.sigmoid(x[:, :24] @ w["smear_gate.weight"].T)
            x = x + gate * torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        first = middle = x
        for n in range(config.depth):
            if config.lambdas:
                x = w["resid_lambdas"][n] * x + w["x0_lambdas"][n] * first
            x = x + attention(n, norm(x), row) @ w[f"layers.{n}.self_attn.o_proj.weight"].T
            inner = F.relu(norm(x) @ w[f"layers.{n}.mlp.fc1.weight"].T) ** 2
            x = x + inner @ w[f"layers.{n}.mlp.fc2.weight"].T
            middle = x if n <= config.depth // 2 else middle
        if config.backout:
            x = x - w["backout_lambda"] * middle
        return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)

    def attention(n, x, row):
        at = f"layers.{n}.self_attn."
        q, k, v = (x @ w[at + f"{name}_proj.weight"].T for name in "qkv")
        if config.has_value_embedding(n):
            gate = 3 * torch.sigmoid(x[:, :12] @ w[at + "value_gate.weight"].T)
            v = v + gate.repeat_interleave(config.head_dim, 1) * w[f"value_embeds.{n}.weight"][row]
        distance = torch.arange(len(row))[:, None] - torch.arange(len(row))
        hidden = (distance < 0) | (distance >= config.windows()[n])
        heads = []
        for head in range(config.heads):
            group = head * config.kv_heads // config.heads
            part, kv_part = (slice(i * config.head_dim, (i + 1) * config.head_dim) for i in (head, group))
            a, b = (config.qk_gain * norm(rotated(t)) for t in (q[:, part], k[:, kv_part]))
            heads.append((a @ b.T / config.head_dim**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, kv_part])
        return torch.cat(heads, -1)

    return torch.stack([row_logits(row) for row in tokens])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_heads": 1},
        {"window_pattern": "SL", "sequence_len": 160},
        {"depth": 3, "value_embeddings": True},
        ALL_ON,
    ],
    ids=["base", "grouped", "windows", "value embeddings", "all switches"],
)
def test_logits_are_those_of_the_published_description(settings):
    model = small_model(**settings)
    tokens, _ = batch(length=model.config.sequence_len)
    expected = reference_logits(model, tokens)
    assert float((model(tokens).detach() - expected).norm() / expected.norm()) < 1e-5


def test_with_every_switch_off_modern_is_base_to_the_bit():
    off = {field.name: field.default for field in dataclasses.fields(MODERN)}
    tokens, _ = batch()
    modern = new_model(small_config(arch="modern", **off), 3)
    assert torch.equal(modern(tokens), new_model(small_config(), 3)(tokens))


@pytest.mark.parametrize(
    "switch", ["rope_theta", "qk_gain", "lambdas", "value_embeddings", "window_pattern", "backout", "smear"]
)
def test_each_switch_does_something_alone(switch):
    settings = {"depth": 3, "sequence_len": 160}
    tokens, _ = batch(length=160)
    changed = small_model(**settings, **{switch: getattr(MODERN, switch)})
    plain = small_model(**settings)
    plain.load_state_dict({k: v for k, v in changed.state_dict().items() if k in plain.state_dict()})
    assert not torch.allclose(changed(tokens), plain(tokens), atol=1e-3)


@pytest.mark.parametrize("settings", [{}, ALL_ON], ids=["base", "modern"])
def test_parameters_are_as_many_as_the_config_says(settings):
    model = small_model(**settings)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    matrices = [m for m in model.modules() if isinstance(m, Linear) and m.weight.shape[1] >= model.config.width]
    assert sum(m.weight.numel() for m in matrices) == model.config.matmul_params()


@pytest.mark.parametrize("settings", [{}, ALL_ON], ids=["base", "modern"])
def test_a_cache_fed_piece_by_piece_gives_the_logits_of_the_whole_row(settings):
    model = small_model(**settings).eval()
    tokens, _ = batch(rows=2, length=20)
    cache = KVCache(model.config, rows=2, length=24, device="cpu", dtype=torch.float32)
    pieces = []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 20)):
            pieces.append(model(tokens[:, start:stop], cache))
            cache.advance(stop - start)
        assert torch.allclose(torch.cat(pieces, 1), model(tokens), atol=1e-4)


def test_a_token_never_sees_what_comes_after_it():
    model = small_model(**ALL_ON)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    assert torch.allclose(model(tokens)[:, :10], model(changed)[:, :10], atol=1e-5)


@torch.no_grad()
def test_first_weights_have_the_published_spread_and_depend_on_the_seed_alone():
    model = new_model(GPTConfig(depth=4, vocab_size=512, sequence_len=64).resolved(), 1)
    again = new_model(model.config, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    layer = model.layers[0]
    assert float(layer.self_attn.q_proj.weight.std()) == pytest.approx(256**-0.5, rel=0.02)
    assert float(layer.mlp.fc1.weight.std()) == pytest.approx(256**-0.5, rel=0.02)
    assert float(model.embed_tokens.weight.std()) == pytest.approx(1.0, rel=0.02)
    for zero in (layer.self_attn.o_proj, layer.mlp.fc2, model.lm_head):
        assert not zero.weight.any()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model = small_model(**ALL_ON)
        model.grad_checkpoint = on
        model.loss(*batch()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_dropout_acts_in_training_only():
    model = small_model(dropout=0.5)
    tokens, _ = batch()
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


class Shallow(GPT):
    """An architecture of one's own."""

    def hidden(self, tokens, cache=None, documents=None):
        return self.embed_tokens(tokens)


def test_an_own_architecture_is_named_by_its_import_path():
    model = new_model(small_config(arch=f"{__name__}.Shallow"), 0)
    assert isinstance(model, Shallow) and model.loss(*batch()).isfinite()
    with pytest.raises(ModelError, match=r"nowhere\.Net"):
        new_model(small_config(arch="nowhere.Net"), 0)


@torch.no_grad()
def test_a_saved_model_is_loaded_in_eval_mode_and_the_dtype_asked_for(tmp_path):
    model = small_model(**ALL_ON).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_config(model.config, tmp_path)
    tokens, _ = batch()
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    rounded = load_model(tmp_path, dtype=torch.bfloat16)
    assert rounded.lm_head.weight.dtype == torch.bfloat16 and not rounded.training
    assert float((rounded(tokens) - model(tokens)).norm() / model(tokens).norm()) < 0.05


def test_a_model_that_is_not_whole_is_said_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"model\.json"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"arch": "base", "colour": "blue"}))
    with pytest.raises(ModelError, match="colour"):
        load_model(tmp_path)
    write_config(small_config(), tmp_path)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_more_tokens_than_the_context_are_an_error():
    with pytest.raises(ModelError, match="context of 24"):
        small_model()(torch.zeros(1, 25, dtype=torch.long))
