"""Matmuls in 8 bits: each number is within the format's rounding, scales are kept right, the head is left alone."""

import pytest
import torch
from small import batch, small_model

from model.errors import ModelError
from model.kernels import fp8


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype, bits", [(fp8.FORWARD, 3), (fp8.BACKWARD, 2)])
def test_a_quantised_tensor_is_within_half_a_unit_of_the_last_place(size, dtype, bits):
    x = torch.randn(64, 48) * size
    eight, scale = fp8.quantise(x, dtype)
    found = eight.float() * scale
    large = x.abs() > x.abs().max() * 1e-3  # smaller ones may be subnormal
    assert float(((found - x).abs() / x.abs())[large].max()) <= 2.0 ** -(bits + 1) * 1.001
    assert float(found.abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_nothing_but_zeros_stays_zero_and_outliers_make_no_nan():
    eight, scale = fp8.quantise(torch.zeros(16, 16), fp8.FORWARD)
    assert not eight.float().any() and float(scale) > 0
    x = torch.full((16, 16), 1e-3)
    x[0, 0] = 3e38
    assert fp8.quantise(x, fp8.FORWARD)[0].float().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_the_quantised_tensors(dtype):
    """Against the same formulas in float64 over what the 8-bit tensors hold."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=dtype).requires_grad_()
    weight = (torch.randn(48, 32, dtype=dtype) * 0.1).requires_grad_()
    grad = torch.randn(2, 24, 48, dtype=dtype) * 1e-4
    y = fp8.linear(x, weight)
    y.backward(grad)
    held = [
        (eight.double() * scale.double())
        for eight, scale in (
            fp8.quantise(x.detach().flatten(0, 1), fp8.FORWARD),
            fp8.quantise(weight.detach(), fp8.FORWARD),
            fp8.quantise(grad.flatten(0, 1), fp8.BACKWARD),
        )
    ]
    wanted = [held[0] @ held[1].T, held[2] @ held[1], held[2].T @ held[0]]
    for found, exact in zip([y, x.grad, weight.grad], wanted):
        found = found.detach().double().view(exact.shape)
        assert float((found - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_matrices_of_blocks_are_in_8_bits_and_no_others(monkeypatch):
    seen = []
    real = fp8.linear
    monkeypatch.setattr(fp8, "linear", lambda x, weight: seen.append(weight.shape) or real(x, weight))
    model = small_model(arch="modern", value_embeddings=True, smear=True, sequence_len=32)
    tokens, targets = batch(rows=2, length=16)
    exact = model.loss(tokens, targets)
    assert not seen
    model.use_fp8()
    loss = model.loss(tokens, targets)
    loss.backward()
    assert len(seen) == 6 * model.config.depth and (model.config.vocab_size, model.config.width) not in seen
    assert 0 < abs(float(loss - exact)) / float(exact) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_context_that_makes_no_whole_blocks_is_refused():
    with pytest.raises(ModelError, match="multiple of 16"):
        small_model(sequence_len=24).use_fp8()


def test_training_in_8_bits_learns_as_well():
    losses = {}
    for eight in (False, True):
        model = small_model(sequence_len=32)
        if eight:
            model.use_fp8()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tokens, targets = batch(rows=2, length=16)
        for _ in range(30):
            loss = model.loss(tokens, targets) / targets.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[eight] = float(loss.detach())
    assert losses[False] < 2.0 and losses[True] < losses[False] * 1.15
