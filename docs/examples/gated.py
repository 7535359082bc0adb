"""An architecture: GPT with a gated MLP (SwiGLU; Shazeer 2020, arXiv 2002.05202) of the same number of parameters."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ResolvedConfig
from model.gpt import GPT, Linear


class GatedMLP(nn.Module):
    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        inner = 8 * config.width // 3 // 16 * 16  # three matrices instead of two, each two thirds as wide
        self.gate = Linear(config.width, inner)
        self.fc1 = Linear(config.width, inner)
        self.fc2 = Linear(inner, config.width)  # starts at zero, as its name ends in fc2

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


class Gated(GPT):
    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = GatedMLP(config)
