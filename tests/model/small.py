"""Small models and batches that the tests of model/ share."""

import torch

from model.config import GPTConfig, OptimConfig
from model.distributed import World
from model.gpt import GPT, new_model

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def small_config(**settings) -> GPTConfig:
    """Two heads of 16 unless told otherwise."""
    return GPTConfig(
        **{"depth": 2, "width": 32, "head_dim": 16, "vocab_size": 61, "sequence_len": 24, **settings}
    ).resolved()


def small_model(seed: int = 0, **settings) -> GPT:
    """With every weight drawn, those that start at zero too, so that nothing is hidden behind a zero."""
    model = new_model(small_config(**settings), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return model


def batch(rows: int = 3, length: int = 24, vocab_size: int = 61, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def optim_config(**settings) -> OptimConfig:
    return OptimConfig(**settings)
