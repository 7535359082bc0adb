"""How the owned part of a bucket is updated: Muon, AdamW, Lion, SGD, or any torch optimiser.

Muon: momentum, then the nearest (semi-)orthogonal matrix, over stacks of same-shape matrices. Polar Express
coefficients: Amsel et al. 2025 (arXiv 2505.16932), computed for 5 steps with a 2% margin; they differ by step and bring
singular values from 1e-3 to about 1. Classic: Jordan et al. 2024, one quintic for every step. NorMuon: Li et al. 2025
(arXiv 2510.05491).
"""

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from model.config import OPTIMISERS, OptimConfig
from model.errors import ModelError
from model.optim.schedule import Rates

if TYPE_CHECKING:
    from model.optim.optimiser import Bucket

# Orthogonalised together; more would take too much memory. 4 of d32's largest matrices, all of one shape up to d16.
STACK_ELEMENTS = 1 << 26

Piece = tuple[str, int, Tensor]  # state "PARAMETER.NAME", the index of the first element held here, the elements


class SavedState(Protocol):
    """Optimiser state of an earlier run, which may have had another number of processes."""

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of state "PARAMETER.NAME"; ModelError when they are not all there."""

    def all_of(self, parameter: str) -> dict[str, Tensor]:
        """Every state of one parameter by NAME, in the shapes that were saved."""


class Rule(Protocol):
    """How the owned part of a bucket is updated, and the state that this needs."""

    def update(self, rates: Rates, steps: int) -> None:
        """Move bucket.own along bucket.own_grads. steps: steps so far, with this one."""

    def pieces(self) -> Iterator[Piece]: ...

    def load(self, saved: SavedState) -> None: ...


class Stateful:
    """State tensors whose first dimension is the owned units of a bucket."""

    def __init__(self, bucket: "Bucket", state: dict[str, Tensor]) -> None:
        self.bucket, self.state = bucket, state

    def pieces(self) -> Iterator[Piece]:
        for span in self.bucket.spans():
            for key, tensor in self.state.items():
                held = tensor[span.start : span.stop]
                yield f"{span.name}.{key}", span.first * held[0].numel(), held.flatten()

    def load(self, saved: SavedState) -> None:
        for span in self.bucket.spans():
            for key, tensor in self.state.items():
                held = tensor[span.start : span.stop]
                values = saved.read(f"{span.name}.{key}", span.first * held[0].numel(), held.numel())
                held.copy_(values.view_as(held))


class Muon(Stateful):
    def __init__(self, bucket: "Bucket", config: OptimConfig, lr: float) -> None:
        own = bucket.own
        rows, columns = own.shape[1:]
        state = {"momentum": torch.zeros_like(own)}
        if config.normuon:
            state["variance"] = own.new_zeros((len(own), rows, 1) if rows >= columns else (len(own), 1, columns))
        super().__init__(bucket, state)
        self.config, self.lr = config, lr * max(1.0, rows / columns) ** 0.5
        auto = "bfloat16" if own.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, auto if config.orthogonal_dtype == "auto" else config.orthogonal_dtype)

    def update(self, rates: Rates, steps: int) -> None:
        grads, momentum = self.bucket.own_grads, self.state["momentum"]
        momentum.lerp_(grads, 1 - rates.momentum)
        nesterov = grads.lerp_(momentum, rates.momentum)
        variance = self.state.get("variance")
        count, rows, columns = self.bucket.own.shape
        many = max(1, STACK_ELEMENTS // (rows * columns))
        for start in range(0, count, many):
            part = slice(start, start + many)
            self._move(self.bucket.own[part], nesterov[part], None if variance is None else variance[part], rates)

    def _move(self, own: Tensor, gradient: Tensor, variance: Tensor | None, rates: Rates) -> None:
        """A stack of matrices (K, m, n) along the orthogonalised gradient."""
        step = orthogonalise(gradient, self.config.coefficients, self.config.iterations, self.dtype)
        if variance is not None:
            step = equalise_rows(step, variance, self.config.normuon_beta2)
        step, lr = step.to(own.dtype), self.lr * rates.lr
        amount = lr * self.config.weight_decay * rates.weight_decay
        if amount and self.config.cautious:  # only where the step shrinks the weight as well (Chen et al. 2025)
            own.sub_(own * (step * own >= 0), alpha=amount)
        elif amount:
            own.mul_(1 - amount)
        own.add_(step, alpha=-lr)


class AdamW(Stateful):
    """Kingma & Ba 2015 with decoupled weight decay, in the order of operations of torch.optim.AdamW."""

    def __init__(
        self, bucket: "Bucket", lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        own = bucket.own
        super().__init__(bucket, {"exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)})
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay

    def update(self, rates: Rates, steps: int) -> None:
        own, grads, (beta1, beta2) = self.bucket.own, self.bucket.own_grads, self.betas
        mean, square, lr = self.state["exp_avg"], self.state["exp_avg_sq"], self.lr * rates.lr
        own.mul_(1 - lr * self.weight_decay * rates.weight_decay)
        mean.lerp_(grads, 1 - beta1)
        square.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        spread = square.sqrt().div_((1 - beta2**steps) ** 0.5).add_(self.eps)
        own.addcdiv_(mean, spread, value=-lr / (1 - beta1**steps))


class Lion(Stateful):
    """Chen et al. 2023: along the sign of a running mean of gradients, so every element moves by the rate itself."""

    def __init__(self, bucket: "Bucket", lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(bucket, {"exp_avg": torch.zeros_like(bucket.own)})
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay

    def update(self, rates: Rates, steps: int) -> None:
        own, grads, (beta1, beta2) = self.bucket.own, self.bucket.own_grads, self.betas
        mean, lr = self.state["exp_avg"], self.lr * rates.lr
        own.mul_(1 - lr * self.weight_decay * rates.weight_decay)
        own.add_(mean.lerp(grads, 1 - beta1).sign_(), alpha=-lr)
        mean.lerp_(grads, 1 - beta2)


class SGD(Stateful):
    """Heavy-ball momentum, the schedule's."""

    def __init__(self, bucket: "Bucket", lr: float, weight_decay: float) -> None:
        super().__init__(bucket, {"momentum": torch.zeros_like(bucket.own)})
        self.lr, self.weight_decay = lr, weight_decay

    def update(self, rates: Rates, steps: int) -> None:
        lr = self.lr * rates.lr
        self.bucket.own.mul_(1 - lr * self.weight_decay * rates.weight_decay)
        self.state["momentum"].mul_(rates.momentum).add_(self.bucket.own_grads)
        self.bucket.own.add_(self.state["momentum"], alpha=-lr)


class External:
    """A torch optimiser named by import path. It may need whole tensors, so every rank updates everything."""

    def __init__(self, config: OptimConfig, groups: list[tuple[float, float, list[tuple[str, nn.Parameter]]]]) -> None:
        self.names = [name for _, _, named in groups for name, _ in named]
        self.rates = [(lr, wd) for lr, wd, _ in groups]
        described = [{"params": [p for _, p in named], "lr": lr, "weight_decay": wd} for lr, wd, named in groups]
        module, _, name = config.name.rpartition(".")
        try:
            self.inner = getattr(importlib.import_module(module), name)(described, **config.args)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            known = f"{', '.join(OPTIMISERS)} or the path of a torch optimiser that takes optim.args"
            raise ModelError(f"optim.name {config.name!r} is not {known}: {error}") from error

    def update(self, rates: Rates, steps: int) -> None:
        for group, (lr, weight_decay) in zip(self.inner.param_groups, self.rates):
            group["lr"], group["weight_decay"] = lr * rates.lr, weight_decay * rates.weight_decay
        self.inner.step()

    def pieces(self) -> Iterator[Piece]:
        for number, state in self.inner.state_dict()["state"].items():
            for key, value in state.items():
                yield f"{self.names[number]}.{key}", 0, torch.as_tensor(value)

    def load(self, saved: SavedState) -> None:
        whole = self.inner.state_dict()
        for number, name in enumerate(self.names):
            whole["state"][number] = saved.all_of(name)
        self.inner.load_state_dict(whole)


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
CLASSIC = ((3.4445, -4.7750, 2.0315),)
MARGIN = {"polar_express": 1.02, "classic": 1.0}  # the first guess is divided by its norm times this


def quintics(name: str, iterations: int) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each iteration x -> a x + b x x^T x + c (x x^T)^2 x; the last one known is repeated."""
    known = POLAR_EXPRESS if name == "polar_express" else CLASSIC
    return tuple(known[min(i, len(known) - 1)] for i in range(iterations))


def orthogonalise(x: Tensor, coefficients: str, iterations: int, dtype: torch.dtype) -> Tensor:
    """x (K, m, n) -> about U V^T of each matrix's decomposition U S V^T, in `dtype`; zeros stay zeros."""
    tall = x.size(1) > x.size(2)
    x = x.mT.to(dtype) if tall else x.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) * MARGIN[coefficients]).clamp_min(1e-20)
    for a, b, c in quintics(coefficients, iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def equalise_rows(update: Tensor, variance: Tensor, beta2: float) -> Tensor:
    """NorMuon: divide each row (or column, whichever are more) of update (K, m, n) by the root of its running mean
    square, `variance` (K, m, 1) or (K, 1, n), changed in place; the Frobenius norm stays."""
    along = 2 if variance.size(2) == 1 else 1
    square = update.square().mean(dim=along, keepdim=True).to(variance.dtype)
    variance.lerp_(square, 1 - beta2)
    scale = variance.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(1, 2), keepdim=True)
    after = (square * scale.square()).sum(dim=(1, 2), keepdim=True)
    return update * (scale * (before / after.clamp_min(1e-10)).sqrt()).to(update.dtype)
