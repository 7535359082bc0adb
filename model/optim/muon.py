"""Muon: momentum, then the nearest (semi-)orthogonal matrix, over stacks of same-shape matrices.

Polar Express coefficients: Amsel et al. 2025 (arXiv 2505.16932), computed for 5 steps with a 2% margin; they differ by
step and bring singular values from 1e-3 to about 1. Classic: Jordan et al. 2024, one quintic for every step.
NorMuon: Li et al. 2025 (arXiv 2510.05491).
"""

import torch
from torch import Tensor

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
    """x (K, m, n) -> about U V^T of each matrix's singular value decomposition, in `dtype`; zeros stay zeros."""
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
