import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import loss
from model.loss import softcap_cross_entropy, token_losses


def reference(hidden, weight, targets, softcap):
    """Plainly, in float64: the sum, and the gradients of hidden and weight."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = softcap * torch.tanh(hidden @ weight.T / softcap)
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return total, *torch.autograd.grad(total, (hidden, weight))


def case(rows, width, vocab, masked=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 3 * width**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = -1
    return hidden, weight, targets


def close(found, wanted, tolerance=1e-6, absolute=0.0):
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm()) + absolute


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    vocab=st.integers(2, 40),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
    chunk=st.sampled_from([1, 64, 1 << 20]),
)
def test_value_and_gradients_are_those_of_the_definition_in_chunks_of_any_size(rows, vocab, masked, seed, chunk):
    hidden, weight, targets = case(rows, 8, vocab, masked, seed)
    with mock.patch.dict(loss.CHUNK_LOGITS, cpu=chunk):
        found = softcap_cross_entropy(hidden, weight, targets, 15.0)
        gradients = torch.autograd.grad(found * 0.5, (hidden, weight))
    total, *wanted = reference(hidden, weight, targets, 15.0)
    rounding = 4e-6 * rows  # of logits up to 15 in float32, which a loss near zero cannot escape
    assert close(found.detach(), total.detach(), absolute=rounding)
    for gradient, expected in zip(gradients, wanted):
        assert close(gradient, expected * 0.5, 3e-6, absolute=rounding)


def test_losses_of_single_tokens_add_up_to_the_sum_and_keep_their_places():
    hidden, weight, targets = case(12, 8, 20)
    losses = token_losses(hidden.view(3, 4, 8), weight, targets.view(3, 4), 15.0)
    assert losses.shape == (3, 4) and bool((losses.flatten()[targets == -1] == 0).all())
    assert close(losses.sum(), reference(hidden, weight, targets, 15.0)[0].detach())


def test_bfloat16_hidden_states_give_a_float32_loss_and_a_float32_gradient_of_the_weight():
    hidden, weight, targets = case(64, 32, 50)
    rounded = hidden.detach().bfloat16().requires_grad_()
    softcap_cross_entropy(rounded, weight, targets, 15.0).backward()
    _, d_hidden, d_weight = reference(rounded, weight.bfloat16(), targets, 15.0)
    assert rounded.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert close(rounded.grad, d_hidden, 2e-2) and close(weight.grad, d_weight, 2e-2)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_float16_hidden_states_give_a_finite_gradient_however_sure_the_model_is(spread):
    hidden, weight, targets = case(64, 32, 4000)
    weight = (weight.detach() * spread).requires_grad_()
    rounded = hidden.detach().half().requires_grad_()
    softcap_cross_entropy(rounded, weight, targets, 15.0).backward()
    _, d_hidden, d_weight = reference(rounded, weight.half(), targets, 15.0)
    assert close(rounded.grad, d_hidden, 1e-2) and close(weight.grad, d_weight, 1e-2)


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, targets = case(5, 8, 20)
    with torch.no_grad():
        assert not softcap_cross_entropy(hidden, weight, targets, 15.0).requires_grad


BIG = """
import resource, sys, torch
from model.loss import softcap_cross_entropy
tokens, width = map(int, sys.argv[1:])
torch.set_num_threads(2)
hidden = torch.randn(tokens, width).requires_grad_()
weight = (torch.randn(65536, width) * 0.05).requires_grad_()
targets = torch.randint(0, 65536, (tokens,))
small = softcap_cross_entropy(hidden[:8], weight, targets[:8], 15.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
softcap_cross_entropy(hidden, weight, targets, 15.0).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "tokens, width, megabytes",
    [(1024, 32, 200), pytest.param(4096, 512, 600, marks=pytest.mark.full)],
)
def test_the_logits_of_a_large_vocabulary_never_stand_at_once(tokens, width, megabytes):
    """They would be 268 MB and 1,074 MB, and the plain way takes five times that."""
    command = [sys.executable, "-c", BIG, str(tokens), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < megabytes * 1e6


@pytest.mark.full
def test_a_large_case_in_float32_is_exact_to_one_in_a_million():
    hidden, weight, targets = case(4096, 512, 65_536)
    found = softcap_cross_entropy(hidden, weight, targets, 15.0)
    found.backward()
    total, d_hidden, d_weight = reference(hidden, weight, targets, 15.0)
    assert close(found.detach(), total.detach()) and close(hidden.grad, d_hidden) and close(weight.grad, d_weight)
