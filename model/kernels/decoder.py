"""A second forward pass of model.gpt.GPT, for decoding: one token of many rows in as few kernel launches as possible.

With one token per row, a call costs more than its work. This is tested to give the same numbers as GPT.hidden. Training
and reading prompts do enough work per call without it, and a model of another class may compute something else.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import GATE_CHANNELS
from model.decoding.kvcache import KVCache
from model.gpt import GPT, Block, Embedding
from model.kernels import matmul
from model.kernels.autograd import EPS, norm
from model.kernels.graphs import Replay, span_for

SHARED_OUT = 64  # rows up to which each thread of a CPU computes its own outputs, measured
FEW = 8  # rows up to which results are made dense: the next GEMM reads others several times as slowly, measured


class Matrix:
    """The weights of linear layers side by side, (out, in).

    in_place: the layers' own weights become views of these, so that there is no second copy.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, in_place: bool = False) -> None:
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        on_cpu = self.whole.device.type == "cpu"
        self.shared_out = SHARED_OUT if on_cpu else 0
        self.parts = self.whole.unflatten(0, (_parts(len(self.whole)) if on_cpu else 1, -1))  # (parts, out / parts, in)
        self.packed: Tensor | None = None
        if in_place:
            for layer, view in zip(layers, self.whole.split([layer.out_features for layer in layers])):
                layer.weight.data = view

    def in_packs(self) -> Tensor:
        """A copy in oneDNN's own order, made at the first call."""
        if self.packed is None:
            self.packed = matmul.pack(self.whole)
        return self.packed


def _parts(outputs: int) -> int:
    """One part per thread, if they are large enough and of one size."""
    return max(n for n in range(1, torch.get_num_threads() + 1) if outputs % n == 0 and (n == 1 or outputs // n >= 64))


class Gemm:
    """Rows times matrices of one shape: (rows, in) -> (rows, out), in memory that the next call overwrites.

    On CPUs, torch's own GEMM of few rows takes up to twice as long as the transposed one, weights times rows, in which
    each thread computes its own outputs; results may then be transposed in memory. Where oneDNN is the faster library,
    it computes everything but single rows.
    """

    def __init__(self, matrix: Matrix, rows: int, fixed: bool = False, dense: bool = False) -> None:
        """matrix: one of that shape. fixed: the result is always in `place`. dense: its rows are contiguous there."""
        like, (outputs, _) = matrix.whole, matrix.whole.shape
        self.packs = rows > 1 and matmul.suits(like, rows)
        self.transposed, self.count = rows <= matrix.shared_out and not self.packs, len(matrix.parts)
        if self.transposed:
            self.parts = like.new_empty(*matrix.parts.shape[:2], rows)
            self.made = self.parts.view(outputs, rows).t() if rows > 1 else self.parts.view(1, outputs)
        else:
            self.made = like.new_empty(rows, outputs)
        self.copies = (fixed and self.packs) or (dense and not self.made.is_contiguous())
        self.place = like.new_empty(rows, outputs) if self.copies else self.made
        self.given: Tensor | None = None

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        made = self.made
        if self.packs:
            made = matmul.onednn(x, matrix.in_packs())
        elif self.transposed:
            torch.bmm(matrix.parts, self._spread(x), out=self.parts)
        else:
            torch.mm(x, matrix.whole.t(), out=made)
        return self.place.copy_(made) if self.copies else made

    def add(self, x: Tensor, matrix: Matrix) -> None:
        """Add the result to what `place` holds."""
        if self.packs:
            self.place.add_(matmul.onednn(x, matrix.in_packs()))
        elif self.transposed:
            self.parts.baddbmm_(matrix.parts, self._spread(x))
        else:
            self.made.addmm_(x, matrix.whole.t())

    def _spread(self, x: Tensor) -> Tensor:
        """(parts, in, rows). x is mostly the tensor of the last call, and a view costs as much as a small GEMM."""
        if x is not self.given:
            self.given, self.spread = x, x.t().expand(self.count, -1, -1)
        return self.spread


@dataclass
class Layer:
    """A block's matrices in the compute dtype; None for what the model does not have."""

    window: int
    joint: Matrix  # of q, k and v
    out: Matrix
    up: Matrix
    down: Matrix
    value: tuple[Tensor, Tensor] | None  # its embedding table, as the model has it, and (in, out) of its gate
    lambdas: tuple[float, float] | None


class Norm:
    """gain * kernels.autograd.norm. On CPUs in four quick calls: x / (hypot(|x|, sqrt(C eps)) / (gain sqrt(C)))."""

    def __init__(self, size: int, like: Tensor, gain: float = 1.0) -> None:
        self.gain = gain
        self.quick = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
        self.floor, self.part = like.new_full((), (size * EPS) ** 0.5), like.new_full((), size**-0.5 / gain)

    def __call__(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """The result is in `place` on the quick way, in new memory otherwise."""
        if not self.quick:
            return norm(x) if self.gain == 1.0 else norm(x) * self.gain
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor).mul_(self.part)
        return torch.div(x, length, out=place)


class Decoder:
    """The weights of a model, joined, cast and laid out for decoding.

    in_place: the model's own matrices become views of these, so that there is no second copy; the model must not be
    trained or moved afterwards. Otherwise these are the weights as they are now: a model in training needs another
    decoder after each step, too often to capture CUDA graphs.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, in_place: bool = False) -> None:
        self.model, self.config, dtype = model, model.config, model.compute_dtype
        cos = model.cos.to(dtype)
        self.cos, self.sin = torch.cat([cos, cos], -1), model.sin.to(dtype)  # (context, 1, D) and (context, 1, D/2)
        self.norm = Norm(self.config.width, cos)
        self.norm_heads = Norm(self.config.head_dim, cos, self.config.qk_gain)
        self.lm_head = Matrix([model.lm_head], dtype, in_place)
        self.layers = [self._layer(number, block, in_place) for number, block in enumerate(model.layers)]
        self.replays = in_place and cos.is_cuda
        self.kept: list[Replay] = []

    def _layer(self, number: int, block: nn.Module, in_place: bool) -> Layer:
        assert isinstance(block, Block)
        model, attention, mlp, dtype = self.model, block.self_attn, block.mlp, self.model.compute_dtype
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        joint, out, up, down = (
            Matrix(some, dtype, in_place) for some in (qkv, [attention.o_proj], [mlp.fc1], [mlp.fc2])
        )
        value = lambdas = None
        if attention.value_gate is not None:
            table = model.value_embeds[str(number)]
            assert isinstance(table, Embedding)
            value = table.weight, attention.value_gate.weight.to(dtype).t()
        if model.config.lambdas:
            lambdas = float(model.resid_lambdas[number].to(dtype)), float(model.x0_lambdas[number].to(dtype))
        return Layer(attention.window, joint, out, up, down, value, lambdas)

    def borrow(self, rows: int, length: int) -> Replay | None:
        """What a batch of `rows` rows of `length` tokens works on, until it is given back; None on CPUs."""
        if not self.replays:
            return None
        with suppress(IndexError):  # two threads may ask at once
            kept = self.kept.pop()
            if kept.rows >= rows and kept.length >= length:
                return kept
            rows, length = max(rows, kept.rows), max(length, kept.length)
            del kept  # frees its memory before the next one takes its own
        length = min(span_for(length), self.config.sequence_len)
        return Replay(self.config, rows, length, self.cos.device, self.cos.dtype)

    def give_back(self, replay: Replay) -> None:
        self.kept[:] = [replay]

    def step(self, rows: int, replay: Replay | None = None) -> "Step":
        """The step of `rows` rows; a replay keeps its own, as long as its graphs."""
        kept = {} if replay is None else replay.steps
        if rows not in kept:
            kept[rows] = Step(self, rows)
        return kept[rows]


class Step:
    """One token of each of `rows` rows, computed in its own memory by views that are made once: with few rows, making
    a step's views takes as long as using them. Two batches at the same time need two steps."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.rows, layer, config = decoder, rows, decoder.layers[0], decoder.config
        assert config.kv_heads
        self.residual = Gemm(layer.down, rows)  # the stream that all layers add to
        self.joint = Gemm(layer.joint, rows, fixed=True, dense=True)
        self.up = Gemm(layer.up, rows, dense=rows <= FEW)
        self.head = Gemm(decoder.lm_head, rows)
        x, heads = self.residual.place, self.joint.place.view(rows, -1, 1, config.head_dim)
        self.normed = x.new_empty(x.shape) if rows <= FEW else torch.empty_like(x)
        self.attended = x.new_empty(rows, config.heads, 1, config.head_dim)
        self.attended_rows = self.attended.view(x.shape)
        self.both, self.v = heads.split_with_sizes([config.heads + config.kv_heads, config.kv_heads], 1)
        self.rotated = self.both.new_empty(self.both.shape)
        self.halves = *self.both.chunk(2, -1), *self.rotated.chunk(2, -1)
        self.sizes = [config.heads, config.kv_heads]
        self.split = self.rotated.split_with_sizes(self.sizes, 1)

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The normed output of the last layer (rows, C), overwritten by the next call. tokens: (rows,) int64, the next
        ones of the cache's rows."""
        decoder, model, config = self.decoder, self.decoder.model, self.decoder.config
        dtype, x = decoder.cos.dtype, self.residual.place
        places = cache.begin(1)
        turn = decoder.cos[places], decoder.sin[places]
        first = decoder.norm(F.embedding(tokens, model.embed_tokens.weight).to(dtype))
        if config.smear:
            first = model.smear(first[:, None], cache)[:, 0]
        x.copy_(first)
        for number, layer in enumerate(decoder.layers):
            if layer.lambdas is not None:
                resid, x0 = layer.lambdas
                x.mul_(resid).add_(first, alpha=x0)
            normed = decoder.norm(x, self.normed)
            q, k, v = self._heads(normed, layer, *turn)
            if layer.value is not None:
                v = self._with_value(v, normed, tokens, *layer.value)
            y = cache.attend_on(number, q, k, v, layer.window)
            self.residual.add(self._in_rows(y), layer.out)
            up = self.up(decoder.norm(x, self.normed), layer.up).relu_()
            self.residual.add(torch.mul(up, up, out=up), layer.down)
            if config.backout and number == config.depth // 2:
                middle = x.clone()
        if config.backout:
            x.sub_(model.backout_lambda.to(dtype) * middle)
        return decoder.norm(x, self.normed)

    def _heads(self, normed: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As SelfAttention.heads, for (rows, C): q (rows, H, 1, D), k and v (rows, H_kv, 1, D)."""
        self.joint(normed, layer.joint)
        low, high, rotated_low, rotated_high = self.halves
        torch.mul(self.both, cos, out=self.rotated)
        rotated_low.addcmul_(high, sin)
        rotated_high.addcmul_(low, sin, value=-1)
        both = self.decoder.norm_heads(self.rotated, self.rotated)
        q, k = self.split if both is self.rotated else both.split_with_sizes(self.sizes, 1)
        return q, k, self.v

    def _with_value(self, v: Tensor, normed: Tensor, tokens: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        value = F.embedding(tokens, table).to(v.dtype).view(v.shape)
        opened = torch.mm(normed[:, :GATE_CHANNELS], gate).sigmoid_()
        return torch.addcmul(v, opened.view(*v.shape[:2], 1, 1), value, value=3)

    def _in_rows(self, attended: Tensor) -> Tensor:
        """(rows, H, 1, D) -> (rows, C), for the GEMM that follows always the same view, if it keeps views at all."""
        if not (self.residual.transposed or self.residual.packs):
            return attended.reshape(self.attended_rows.shape)
        self.attended.copy_(attended)
        return self.attended_rows

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab) float32 of hidden (rows, C), before GPT.cap; overwritten by the next call."""
        return self.head(hidden, self.decoder.lm_head).float()


def decoder_of(model: nn.Module, in_place: bool = False) -> Decoder | None:
    """The model's decoder; None for other classes, which may compute something else than GPT does."""
    return Decoder(model, in_place) if type(model) is GPT else None
