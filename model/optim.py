"""One optimiser for all parameters, its state sharded over ranks: reduce-scatter, update what you own, all-gather."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.buckets import Bucket
from model.config import OptimConfig
from model.distributed import World
from model.rules import SGD, AdamW, External, Muon, Piece, Rule, SavedState
from model.schedule import Rates

RESID_LR_FRAC = 0.01  # residual lambdas learn at this part of scalar_lr [nanochat, 2026]

Named = list[tuple[str, nn.Parameter]]


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """The group that decides a parameter's rule and rate; own architectures follow the same names and shapes."""
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
    """Before the schedule. Muon's factor for the shape is not in it."""
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
    """Takes the model's parameters over: from here on they and their gradients are views of its buckets.

    Each backward pass adds to the gradients; step() uses the sums over all ranks and zeroes them.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, width: int, world: World, lr_factor: float = 1.0) -> None:
        """lr_factor multiplies every rate. Raises ModelError for an optimiser that cannot be had."""
        self.config, self.width, self.world, self.lr_factor = config, width, world, lr_factor
        self.steps = 0
        groups: dict[tuple[str, tuple[int, ...]], Named] = defaultdict(list)
        for name, parameter in model.named_parameters():
            kind = kind_of(name, parameter)
            stacked = config.name == "muon" and kind == "matrix"
            groups[kind, tuple(parameter.shape) if stacked else ()].append((name, parameter))
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
        return AdamW(bucket, lr, betas_of(kind, config), config.eps, weight_decay)

    def _external(self, kinds: dict[str, Named]) -> tuple[Bucket, Rule]:
        bucket = Bucket([pair for named in kinds.values() for pair in named], self.world, matrices=False, sharded=False)
        decays = {kind: self.config.weight_decay if kind == "matrix" else 0.0 for kind in kinds}
        return bucket, External(self.config, [(self.lr(kind), decays[kind], named) for kind, named in kinds.items()])

    def lr(self, kind: str) -> float:
        return learning_rate(kind, self.config, self.width) * self.lr_factor

    @torch.no_grad()
    def step(
        self, rates: Rates, grad_scale: float = 1.0, clip: float | None = None, drop_above: float | None = None
    ) -> Tensor:
        """Update all parameters with the gradients added up over ranks, times grad_scale, clipped to a norm of `clip`.

        Returns the global gradient norm before clipping, a float32 scalar on the device; nothing waits for it unless
        drop_above is set: then a step whose norm is larger, or not finite, changes nothing.
        """
        for work in [bucket.reduce() for bucket, _ in self.parts]:
            work.wait()
        norm = self.grad_norm() * grad_scale
        if drop_above is not None and not (norm.isfinite() & (norm <= drop_above)):
            self.zero_grad()
            return norm
        factor = grad_scale if clip is None else grad_scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        self.steps += 1
        pending = []
        for bucket, rule in self.parts:
            bucket.own_grads.mul_(factor)
            rule.update(rates, self.steps)
            pending.append(bucket.gather())
        for work in pending:
            work.wait()
        self.zero_grad()
        return norm

    def grad_norm(self) -> Tensor:
        total = torch.stack([bucket.square_sum() for bucket, _ in self.parts]).sum()
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
