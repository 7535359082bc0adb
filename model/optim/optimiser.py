"""One optimiser for all parameters, its state sharded over ranks: reduce-scatter, update what you own, all-gather."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import OptimConfig
from model.distributed import Done, Handle, World
from model.optim.rules import SGD, AdamW, External, Lion, Muon, Piece, Rule, SavedState
from model.optim.schedule import Rates

SQUARED_AT_ONCE = 1 << 26  # gradients; more squares would take too much memory
RESID_LR_FRAC = 0.01  # residual lambdas learn at this part of scalar_lr [nanochat, 2026]


@dataclass(frozen=True)
class Span:
    """Owned units [start, stop) of a bucket are the units from `first` on of parameter `name`."""

    name: str
    first: int
    start: int
    stop: int


class Bucket:
    """Parameters and gradients as views of two buffers (units, *unit).

    A unit is never split over ranks: a matrix for Muon (unit = its shape), a single number for elementwise
    rules (unit = ()). The end is padded with zeros to a multiple of the world's size. With sharded=False every rank
    owns everything, and gradients are added up instead of scattered.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], world: World, matrices: bool, sharded: bool) -> None:
        self.world, self.sharded = world, sharded and world.size > 1
        self.names = [name for name, _ in named]
        first = named[0][1]
        unit = tuple(first.shape) if matrices else ()
        self.counts = [1 if matrices else parameter.numel() for _, parameter in named]
        parts = world.size if self.sharded else 1
        padded = -(-sum(self.counts) // parts) * parts
        self.params = torch.zeros(padded, *unit, device=first.device, dtype=first.dtype)
        self.grads = torch.zeros_like(self.params)
        at = 0
        for (_, parameter), count in zip(named, self.counts):
            view = self.params[at : at + count].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.grads[at : at + count].view(parameter.shape)
            at += count
        size = padded // parts
        part = world.rank if self.sharded else 0
        self.low, self.high = part * size, (part + 1) * size
        self.own, self.own_grads = self.params[self.low : self.high], self.grads[self.low : self.high]

    def spans(self) -> Iterator[Span]:
        """Which parameters, and which of their units, this rank owns."""
        at = 0
        for name, count in zip(self.names, self.counts):
            start, stop = max(at, self.low), min(at + count, self.high)
            if start < stop:
                yield Span(name, start - at, start - self.low, stop - self.low)
            at += count

    def reduce(self) -> Handle:
        """Start summing the gradients over ranks; own_grads hold the sums after wait()."""
        if self.sharded:
            return self.world.reduce_scatter(self.own_grads, self.grads)
        return self.world.sum(self.grads, wait=False)

    def gather(self) -> Handle:
        """Start sending the updated part to the other ranks."""
        return self.world.all_gather(self.params, self.own) if self.sharded else Done()

    def square_sum(self) -> Tensor:
        """Sum of squares of the owned gradients; where all ranks own the same, the main process alone counts them."""
        dtype = torch.promote_types(self.own_grads.dtype, torch.float32)
        parts = self.own_grads.view(-1).split(SQUARED_AT_ONCE)
        total = torch.stack([part.square().sum(dtype=dtype) for part in parts]).sum()
        return total if self.sharded or self.world.is_main else torch.zeros_like(total)


Named = list[tuple[str, nn.Parameter]]
Arrived = tuple[Bucket, Rule, Tensor]  # the tensor: sum of squares of the owned gradients


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """The group that decides a parameter's rule and rate, by its name and shape; also for own architectures."""
    if name.startswith("value_embeds"):
        return "value_embedding"
    if name.startswith("embed_tokens"):
        return "embedding"
    if name.startswith("lm_head"):
        return "unembedding"
    if parameter.ndim == 2:
        return "matrix"
    return "residual" if name.startswith("resid") else "scalar"


def learning_rate(kind: str, config: OptimConfig, width: int) -> float:
    """The rate of a kind of parameters before the schedule, and before Muon's factor for the shape of a matrix."""
    scale = config.init_lr_frac
    if kind == "matrix":
        return config.matrix_lr * scale
    if kind in ("scalar", "residual"):
        return config.scalar_lr * scale * (RESID_LR_FRAC if kind == "residual" else 1.0)
    if config.width_ref:
        scale *= (width / config.width_ref) ** -0.5
    return getattr(config, f"{kind}_lr") * scale


def betas_of(kind: str, config: OptimConfig) -> tuple[float, float]:
    own = {
        "embedding": config.embedding_betas,
        "value_embedding": config.embedding_betas,
        "unembedding": config.unembedding_betas,
        "scalar": config.scalar_betas,
    }
    return own.get(kind) or config.betas


class Optimizer:
    """Takes over the model's parameters: from now on they and their gradients are views of its buckets.

    Each backward pass adds to the gradients; step() uses the sums over all ranks and zeroes them.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, width: int, world: World, lr_factor: float = 1.0) -> None:
        """lr_factor multiplies every rate. Raises ModelError for a class that cannot be imported or built."""
        self.config, self.width, self.world, self.lr_factor = config, width, world, lr_factor
        self.steps = 0
        groups: dict[tuple[str, tuple[int, ...]], Named] = defaultdict(list)
        for name, parameter in model.named_parameters():
            kind = kind_of(name, parameter)
            stacked = config.name == "muon" and kind == "matrix"
            groups[kind, tuple(parameter.shape) if stacked else ()].append((name, parameter))
        self.kinds = list(dict.fromkeys(kind for kind, _ in groups))
        self.parts: list[tuple[Bucket, Rule]] = []
        if "." in config.name:
            self.parts.append(self._external({kind: named for (kind, _), named in groups.items()}))
            return
        for (kind, shape), named in groups.items():
            small = kind in ("scalar", "residual")
            bucket = Bucket(named, world, matrices=bool(shape), sharded=not small)
            self.parts.append((bucket, self._rule(kind, bool(shape), bucket)))

    def _rule(self, kind: str, stacked: bool, bucket: Bucket) -> Rule:
        config, lr = self.config, self.lr(kind)
        weight_decay = config.weight_decay if kind == "matrix" else 0.0
        if stacked:
            return Muon(bucket, config, lr)
        if config.name == "sgd":
            return SGD(bucket, lr, weight_decay)
        if config.name == "lion":
            return Lion(bucket, lr, betas_of(kind, config), weight_decay)
        return AdamW(bucket, lr, betas_of(kind, config), config.eps, weight_decay)

    def _external(self, kinds: dict[str, Named]) -> tuple[Bucket, Rule]:
        bucket = Bucket([pair for named in kinds.values() for pair in named], self.world, matrices=False, sharded=False)
        decays = {kind: self.config.weight_decay if kind == "matrix" else 0.0 for kind in kinds}
        return bucket, External(self.config, [(self.lr(kind), decays[kind], named) for kind, named in kinds.items()])

    def lr(self, kind: str) -> float:
        return learning_rate(kind, self.config, self.width) * self.lr_factor

    def learning_rates(self, rates: Rates) -> dict[str, float]:
        """The rates of a step by kind of parameter: lr/matrix and so on."""
        return {f"lr/{kind}": self.lr(kind) * rates.lr for kind in self.kinds}

    @torch.no_grad()
    def step(
        self, rates: Rates, grad_scale: float = 1.0, clip: float | None = None, drop_above: float | None = None
    ) -> Tensor:
        """Update all parameters with the gradients added up over ranks, times grad_scale, clipped to a norm of `clip`.

        Returns the global gradient norm before clipping, a float32 scalar on the device; nothing waits for it unless
        drop_above is set: then a step whose norm is larger, or not finite, changes nothing.
        """
        arriving: Iterable[Arrived] = self._arriving()
        factor: float | Tensor = grad_scale
        norm = None
        if clip is not None or drop_above is not None:  # the norm is needed first, so the gradients of all buckets are
            arriving = list(arriving)
            norm = self._norm([square for _, _, square in arriving]) * grad_scale
            if drop_above is not None and not (norm.isfinite() & (norm <= drop_above)):
                self.zero_grad()
                return norm
            if clip is not None:
                factor = grad_scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        squares = self._update(rates, factor, arriving)
        return self._norm(squares) * grad_scale if norm is None else norm

    def _arriving(self) -> Iterator[Arrived]:
        """Each bucket as soon as its gradients are summed over ranks, while those of the next ones are on their way."""
        sums = [bucket.reduce() for bucket, _ in self.parts]
        for (bucket, rule), work in zip(self.parts, sums):
            work.wait()
            yield bucket, rule, bucket.square_sum()

    def _update(self, rates: Rates, factor: float | Tensor, arriving: Iterable[Arrived]) -> list[Tensor]:
        """Each bucket is sent round while the next one is updated. Returns the sums of squares of the gradients."""
        self.steps += 1
        squares, sent = [], []
        for bucket, rule, square in arriving:
            bucket.own_grads.mul_(factor)
            rule.update(rates, self.steps)
            sent.append(bucket.gather())
            squares.append(square)
        self.zero_grad()
        for work in sent:
            work.wait()
        return squares

    def _norm(self, squares: list[Tensor]) -> Tensor:
        """The norm of all gradients, over all ranks."""
        total = torch.stack(squares).sum()
        self.world.sum(total)
        return total.sqrt()

    def zero_grad(self) -> None:
        for bucket, _ in self.parts:
            bucket.grads.zero_()

    def pieces(self) -> Iterator[Piece]:
        """The state that this rank holds."""
        for _, rule in self.parts:
            yield from rule.pieces()

    def load(self, saved: SavedState, steps: int) -> None:
        """Take the owned part of a saved state. Raises ModelError when it is of another optimiser."""
        self.steps = steps
        for _, rule in self.parts:
            rule.load(saved)
