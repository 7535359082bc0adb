"""One token of many rows at once, in as few calls as there can be: with a token a row, a call costs more than its work.

It computes what model.gpt.GPT.hidden does, and nothing else may use it: training and reading prompts have work enough
for a call, and a model of another class may do anything.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import GATE_CHANNELS
from model.functional import EPS, norm
from model.gpt import GPT, Block
from model.graphs import Replay, span_for
from model.kvcache import KVCache

SHARED_OUT = 64  # rows up to which a CPU's threads each multiply by their own outputs, measured
FEW = 8  # rows of which a product is turned, as the next one reads them several times as slowly otherwise, measured


class Matrix:
    """The weights of linear layers side by side, (out, in).

    On CPUs torch's own product of few rows is up to half as fast as one that is turned round, weights times rows, with
    each thread at its own outputs. in_place: as of Decoder.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, in_place: bool = False) -> None:
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        on_cpu = self.whole.device.type == "cpu"
        self.shared_out = SHARED_OUT if on_cpu else 0
        self.parts = self.whole.unflatten(0, (_parts(len(self.whole)) if on_cpu else 1, -1))  # (parts, out / parts, in)
        if in_place:
            for layer, view in zip(layers, self.whole.split([layer.out_features for layer in layers])):
                layer.weight.data = view

    def times(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out)."""
        product = self.product(x)
        if len(x) == 1:
            return product.view(1, -1)  # the same memory by other strides
        return product.contiguous() if len(x) <= FEW else product

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x (rows, out) + y (rows, in) times this."""
        return torch.addmm(x, y, self.whole.t()) if len(x) > self.shared_out else x + self.product(y)

    def product(self, x: Tensor) -> Tensor:
        """As times, in memory perhaps with the outputs before the rows."""
        if len(x) > self.shared_out:
            return F.linear(x, self.whole)
        return torch.bmm(self.parts, x.t().expand(len(self.parts), -1, -1)).view(-1, len(x)).t()


def _parts(outputs: int) -> int:
    """One for each thread, if they are large enough and come out even."""
    return max(n for n in range(1, torch.get_num_threads() + 1) if outputs % n == 0 and (n == 1 or outputs // n >= 64))


@dataclass
class _Layer:
    """Matrices in the dtype of the computation; None is what the layer does without."""

    window: int
    joint: Matrix  # of q, k and v
    out: Matrix
    up: Matrix
    down: Matrix
    value: tuple[Tensor, Tensor] | None  # its embedding table, as the model has it, and (in, out) of its gate
    lambdas: tuple[float, float] | None


class Decoder:
    """The weights of a model, joined, cast and laid out for decoding.

    in_place: the model's own matrices become views of these, so that there is no second copy; it may be neither trained
    nor moved afterwards. Otherwise these are the weights as they are now, and a model that is trained needs another
    decoder after each step, too often to make graphs of its steps.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, in_place: bool = False) -> None:
        self.model, config, dtype = model, model.config, model.compute_dtype
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.heads, config.kv_heads
        self.qk_gain = config.qk_gain
        cos, sin = model.cos.to(dtype), model.sin.to(dtype)
        self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)  # (context, 1, D)
        self.quick = cos.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self.zero = cos.new_zeros(())
        self.floors = {size: cos.new_full((), (size * EPS) ** 0.5) for size in (config.width, config.head_dim)}
        self.lm_head = Matrix([model.lm_head], dtype, in_place)
        self.layers = [self._layer(number, block, in_place) for number, block in enumerate(model.layers)]
        self.replays = in_place and cos.is_cuda
        self.kept: list[Replay] = []

    def borrow(self, rows: int, length: int) -> Replay | None:
        """What a batch of so many rows of so many tokens works on, its own until it is given back; None on CPUs."""
        if not self.replays:
            return None
        with suppress(IndexError):  # two threads may ask at once
            kept = self.kept.pop()
            if kept.rows >= rows and kept.length >= length:
                return kept
            rows, length = max(rows, kept.rows), max(length, kept.length)
            del kept  # before there is another
        config = self.model.config
        return Replay(config, rows, min(span_for(length), config.sequence_len), self.cos.device, self.cos.dtype)

    def give_back(self, replay: Replay) -> None:
        self.kept[:] = [replay]

    def _layer(self, number: int, block: Block, in_place: bool) -> _Layer:
        model, attention, mlp, dtype = self.model, block.self_attn, block.mlp, self.model.compute_dtype
        matrices = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.fc1], [mlp.fc2]]
        value = lambdas = None
        if attention.value_gate is not None:
            value = model.value_embeds[str(number)].weight, attention.value_gate.weight.to(dtype).t()
        if model.config.lambdas:
            lambdas = float(model.resid_lambdas[number].to(dtype)), float(model.x0_lambdas[number].to(dtype))
        return _Layer(attention.window, *(Matrix(some, dtype, in_place) for some in matrices), value, lambdas)

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The normed output of the last layer (rows, C) for tokens (rows,) int64, which continue the cache's rows."""
        model, config, dtype = self.model, self.model.config, self.model.compute_dtype
        places = cache.begin(1)
        turn = self.cos[places], self.sin[places]
        x = self._norm(F.embedding(tokens, model.embed_tokens.weight).to(dtype))
        if config.smear:
            x = model.smear(x[:, None], cache)[:, 0]
        first, middle = x, None
        for number, layer in enumerate(self.layers):
            if layer.lambdas is not None:
                resid, x0 = layer.lambdas
                x = torch.add(resid * x, first, alpha=x0)
            normed = self._norm(x)
            q, k, v = self._heads(normed, layer, turn)
            if layer.value is not None:
                v = self._with_value(v, normed, tokens, *layer.value)
            y = cache.attend_on(number, q, k, v, layer.window)
            x = layer.out.add(x, y.reshape(x.shape))
            x = layer.down.add(x, layer.up.times(self._norm(x)).relu_().square_())
            if config.backout and number == config.depth // 2:
                middle = x
        if middle is not None:
            x = x - model.backout_lambda.to(dtype) * middle
        return self._norm(x)

    def _heads(self, normed: Tensor, layer: _Layer, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As SelfAttention.heads, for (rows, C): q (rows, H, 1, D), k and v (rows, H_kv, 1, D)."""
        heads = layer.joint.times(normed).contiguous().view(len(normed), -1, 1, self.head_dim)
        both, v = heads.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], 1)
        both = self._norm(torch.addcmul(both * turn[0], both.roll(self.head_dim // 2, -1), turn[1]))
        if self.qk_gain != 1.0:
            both = both * self.qk_gain
        q, k = both.split_with_sizes([self.heads, self.kv_heads], 1)
        return q, k, v

    def _with_value(self, v: Tensor, normed: Tensor, tokens: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        value = F.embedding(tokens, table).to(v.dtype).view(v.shape)
        opened = torch.mm(normed[:, :GATE_CHANNELS], gate).sigmoid_()
        return torch.addcmul(v, opened.view(*v.shape[:2], 1, 1), value, value=3)

    def _norm(self, x: Tensor) -> Tensor:
        """norm in three calls: x sqrt(C) / hypot(|x|, sqrt(C eps))."""
        if not self.quick:
            return norm(x)
        size = x.size(-1)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcdiv(self.zero, x, length.hypot_(self.floors[size]), value=size**0.5)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab) float32 of hidden (rows, C), still without GPT.cap."""
        return self.lm_head.product(hidden).float()


def decoder_of(model: nn.Module, in_place: bool = False) -> Decoder | None:
    """None for a model that may compute something else than GPT does."""
    return Decoder(model, in_place) if type(model) is GPT else None
