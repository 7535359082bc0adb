"""The model: a pre-norm decoder with rotary positions, QK norm and squared-ReLU MLPs. Every switch is off by default.

Module names follow the Hugging Face `nanochat` model type, so that base weights need no renaming to be exported.
"""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import attend
from model.config import GATE_CHANNELS, SMEAR_CHANNELS, ResolvedConfig
from model.decoding.kvcache import KVCache
from model.errors import ModelError
from model.kernels import fp8
from model.kernels.autograd import norm, rotate, squared_relu
from model.kernels.matmul import linear
from model.loss import softcap_cross_entropy

SOFTCAP = 15.0


class Linear(nn.Linear):
    """A matrix without bias. Its weight is kept in float32 and used in the dtype of the input, or in 8 bits."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)
        self.fp8 = False

    def reset_parameters(self) -> None:
        """GPT.init_weights draws the weights; torch's default would be thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return fp8.linear(x, weight) if self.fp8 and torch.is_grad_enabled() else linear(x, weight)


class Embedding(nn.Embedding):
    """A lookup table in float32; GPT.init_weights fills it."""

    def reset_parameters(self) -> None:
        """As in Linear."""


@dataclass
class Context:
    """What every layer of one pass needs beside x: rotary tables, an engine's cache, document ids, backend."""

    cos: Tensor
    sin: Tensor
    cache: KVCache | None
    documents: Tensor | None
    backend: str


class SelfAttention(nn.Module):
    def __init__(self, config: ResolvedConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.qk_gain = layer, config.windows()[layer], config.qk_gain
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.kv_width)
        self.v_proj = Linear(config.width, config.kv_width)
        self.o_proj = Linear(config.width, config.width)
        self.value_gate = Linear(GATE_CHANNELS, config.kv_heads) if config.has_value_embedding(layer) else None

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, H_kv, D), rotated and normed, and v (B, T, H_kv, D)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = norm(rotate(q, context.cos, context.sin)), norm(rotate(k, context.cos, context.sin))
        return (q, k, v) if self.qk_gain == 1.0 else (q * self.qk_gain, k * self.qk_gain, v)

    def forward(self, x: Tensor, value: Tensor | None, context: Context) -> Tensor:
        """x: (B, T, C), value: (B, T, H_kv * D) of the token or None. Returns (B, T, C)."""
        q, k, v = self.heads(x, context)
        if self.value_gate is not None and value is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        if context.cache is None:
            y = attend(q, k, v, self.window, context.documents, context.backend)
        else:
            y = context.cache.attend(self.layer, q, k, v, self.window)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, 4 * config.width)
        self.fc2 = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(squared_relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ResolvedConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, value: Tensor | None, context: Context) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = x + self.drop(self.self_attn(norm(x), value, context))
        return x + self.drop(self.mlp(norm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """tokens (B, T) int64 -> hidden (B, T, C) in compute_dtype -> logits (B, T, vocab) float32.

    An own architecture is a class built as Class(config) that has config, init_weights, hidden, head, loss,
    use_compiler, use_fp8 and lm_head; it may be a subclass.
    """

    cos: Tensor  # (context, 1, D/2)
    sin: Tensor

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.grad_checkpoint = False
        self.compiled = False
        self.attention_backend = "sdpa"
        self.embed_tokens = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.lm_head = Linear(config.width, config.vocab_size)
        with_value = [layer for layer in range(config.depth) if config.has_value_embedding(layer)]
        self.value_embeds = nn.ModuleDict({str(n): Embedding(config.vocab_size, config.kv_width) for n in with_value})
        if config.lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(config.depth))
            self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        angles = rotary_angles(config)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights on the CPU, in the order of named_modules; float32. Formulas: see each line."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                fan_out, fan_in = module.weight.shape
                zero = name.endswith(("o_proj", "fc2", "lm_head", "value_gate"))
                std = 0.0 if zero else min(1.0, (fan_out / fan_in) ** 0.5) * fan_in**-0.5
                fill_normal(module.weight, std, generator)
            elif isinstance(module, Embedding):
                fill_normal(module.weight, 1.0 if name == "embed_tokens" else self.config.width**-0.5, generator)
        if self.config.lambdas:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, self.config.depth))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, self.config.depth))
        if self.config.backout:
            self.backout_lambda.fill_(0.2)
        if self.config.smear:
            self.smear_lambda.zero_()

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """The normed output of the last layer, (B, T, C). With a cache, tokens continue its rows; see KVCache."""
        context = self.context(tokens, cache, documents)
        x = norm(self.embed_tokens(tokens).to(self.compute_dtype))
        if self.config.smear:
            x = self.smear(x, cache)
        x = F.dropout(x, self.config.dropout, self.training)
        first = x
        middle = None
        for number, layer in enumerate(self.layers):
            if self.config.lambdas:
                x = self.resid_lambdas[number].to(x.dtype) * x + self.x0_lambdas[number].to(x.dtype) * first
            value = self.value_embeds[str(number)](tokens).to(x.dtype) if str(number) in self.value_embeds else None
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, value, context, use_reentrant=False)
            else:
                x = layer(x, value, context)
            if self.config.backout and number == self.config.depth // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return norm(x)

    def context(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Context:
        if cache is None:
            if tokens.size(1) > len(self.cos):
                raise ModelError(f"{tokens.size(1)} tokens do not fit the model's context of {len(self.cos)}")
            places: slice | Tensor = slice(0, tokens.size(1))
        else:
            places = cache.begin(tokens.size(1))
            if isinstance(places, Tensor):  # padding may be past the end; what is computed for it is never read
                places = places.clamp(max=len(self.cos) - 1)
        cos, sin = self.cos[places], self.sin[places]
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        return Context(cos, sin, cache, documents, self.attention_backend)

    def smear(self, x: Tensor, cache: KVCache | None) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1] if cache is None else cache.previous(x)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * before

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32, softly capped at 15: (..., C) -> (..., vocab)."""
        return self.cap(self.lm_head(hidden).float())

    def cap(self, logits: Tensor) -> Tensor:
        """15 * tanh(logits / 15), as a scaled sigmoid, which is faster. Keeps the order of logits."""
        return torch.sigmoid(logits * (2 / SOFTCAP)) * (2 * SOFTCAP) - SOFTCAP

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of every position, (B, T, vocab) float32."""
        return self.head(self.hidden(tokens, cache))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the negative log-probabilities of targets other than -1, in nats. Both (B, T); a float32 scalar."""
        return softcap_cross_entropy(self.hidden(tokens), self.lm_head.weight, targets, SOFTCAP, self.compiled)

    def use_fp8(self) -> None:
        """Train the matrices of the blocks in 8 bits from now on; never the head, embeddings and small gates.

        Raises ModelError for a context that is not a multiple of what the hardware needs.
        """
        if self.config.sequence_len % fp8.MULTIPLE:
            raise ModelError(f"fp8 needs model.sequence_len to be a multiple of {fp8.MULTIPLE}")
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.fp8 = fp8.fits(module.weight)

    def use_compiler(self) -> None:
        """Use torch.compile from now on, with static shapes."""
        self.hidden = torch.compile(self.hidden, dynamic=False)  # type: ignore[method-assign]
        self.compiled = True


def rotary_angles(config: ResolvedConfig) -> Tensor:
    """(context, 1, D/2) float32: position * theta^(-2i/D)."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    return torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), frequency)[:, None]


def fill_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """In place; drawn on the CPU, so that every device starts from the same numbers."""
    if std == 0.0:
        weight.zero_()
    else:
        weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def build_model(config: ResolvedConfig) -> GPT:
    """The architecture that config.arch names, with memory for its weights but nothing in them."""
    if config.arch in ("base", "modern"):
        return GPT(config)
    module, _, name = config.arch.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(config)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"model.arch {config.arch!r} is neither base, modern nor the path of a class: {error}"
        ) from error


def new_model(config: ResolvedConfig, seed: int) -> GPT:
    """A resolved config's model on the CPU, in training mode, its weights drawn from `seed`."""
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model
