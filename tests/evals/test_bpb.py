"""Bits per byte: the formula, against plain numbers."""

import math

import torch

from evals.metrics import bits_per_byte, nats_and_bytes
from model.config import GPTConfig
from model.gpt import GPT


def test_special_and_masked_targets_do_not_count():
    config = GPTConfig(depth=1, width=16, head_dim=16, sequence_len=8).resolved(20)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (3, 8), generator=generator)
    targets = torch.randint(20, (3, 8), generator=generator)
    targets[0, :4] = -1
    token_bytes = torch.arange(20) % 5  # tokens 0, 5, 10 and 15 are special

    batches = [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])]
    nats, total = nats_and_bytes(model, batches, token_bytes)

    with torch.no_grad():
        logprobs = model(tokens).log_softmax(-1)
    expected, expected_bytes = 0.0, 0
    for row, column in [(r, c) for r in range(3) for c in range(8)]:
        target = int(targets[row, column])
        if target >= 0 and target % 5:
            expected -= float(logprobs[row, column, target])
            expected_bytes += target % 5
    assert total == expected_bytes and math.isclose(nats, expected, rel_tol=1e-5)
    assert math.isclose(bits_per_byte(nats, total), expected / math.log(2) / expected_bytes, rel_tol=1e-5)
    assert bits_per_byte(1.0, 0) == math.inf
