"""Policy gradients: the loss and its gradient against the formula, and nothing that a tool wrote is learnt."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import GPTConfig
from model.gpt import GPT
from model.training.policy import Objective, Rollout, advantages, batches, divergence, loss, token_logprobs

VOCAB = 30


def make_model() -> GPT:
    model = GPT(GPTConfig(depth=2, width=32, head_dim=16, sequence_len=64).resolved(VOCAB))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


ROLLOUTS = [
    Rollout([1, 2, 3], [4, 5, 6, 7], [True, False, False, True], 1.0, 0.75, [-1.0, -2.0, -3.0, -4.0]),
    Rollout([1, 2], [8, 9], [True, True], 0.0, -0.25, [-2.5, -2.0]),
    Rollout([1], [3, 3, 3, 3, 3, 3], [True] * 6, 0.0, -0.25, [-3.0] * 6),
]


def reference_logprobs(model, rollout) -> torch.Tensor:
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    logprobs = model(ids)[0, len(rollout.prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("batch_tokens", [7, 1000])
def test_the_gradient_is_that_of_advantage_times_logprob_of_the_tokens_the_model_wrote(batch_tokens):
    model, other = make_model(), make_model()
    for batch in batches(ROLLOUTS, batch_tokens, torch.device("cpu")):
        loss(token_logprobs(model, batch)[0], batch, Objective(), None).backward()

    total = 0
    for rollout in ROLLOUTS:
        total = total - rollout.advantage * (reference_logprobs(other, rollout) * torch.tensor(rollout.trained)).sum()
    total.backward()

    for mine, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_many_chunks_of_the_head_give_the_same(monkeypatch):
    model, other = make_model(), make_model()
    (batch,) = batches(ROLLOUTS, 1000, torch.device("cpu"))
    whole, entropy = token_logprobs(other, batch)
    monkeypatch.setattr("model.training.policy.HEAD_LOGITS", 4 * VOCAB)
    parts, entropy_of_parts = token_logprobs(model, batch)
    whole.sum().backward()
    parts.sum().backward()

    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(entropy_of_parts, entropy)
    for mine, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine.grad, expected.grad, atol=1e-6, rtol=1e-4)


def test_entropy_of_an_even_distribution_is_the_logarithm_of_its_size():
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    (batch,) = batches(ROLLOUTS, 1000, torch.device("cpu"))

    _, entropy = token_logprobs(model, batch)

    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(VOCAB)))
    assert len(entropy) == sum(sum(rollout.trained) for rollout in ROLLOUTS)


def test_clipping_stops_the_gradient_beyond_the_trust_region():
    (batch,) = batches(ROLLOUTS[:1], 1000, torch.device("cpu"))  # advantage 0.75; old log-probabilities -1 and -4
    logprobs = torch.tensor([-1.0 + 0.5, -4.0 + 0.1], requires_grad=True)

    value = loss(logprobs, batch, Objective(clip=0.2), None)
    value.backward()

    torch.testing.assert_close(value.detach(), torch.tensor(-0.75 * (1.2 + math.exp(0.1))))
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.75 * math.exp(0.1)]))


def test_divergence_is_added_with_its_weight_and_never_negative():
    (batch,) = batches(ROLLOUTS[1:2], 1000, torch.device("cpu"))
    logprobs, start = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])

    plain = loss(logprobs, batch, Objective(), None)

    expected = plain + 0.1 * (math.exp(-0.5) + 0.5 - 1)
    torch.testing.assert_close(loss(logprobs, batch, Objective(kl=0.1), start), expected)
    assert (divergence(torch.linspace(-5, 0, 20), torch.full((20,), -2.0)) >= 0).all()


def test_advantages_are_within_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])

    assert advantages(rewards).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    divided = advantages(rewards, divide_by_std=True)
    torch.testing.assert_close(divided[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4, rtol=0)
    assert divided[1].tolist() == [0.0] * 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(5, 60))
def test_every_rollout_is_in_one_batch_of_limited_size(sizes, batch_tokens):
    rollouts = [Rollout([1] * a, [2] * b, [True] * b, 0.0, float(n)) for n, (a, b) in enumerate(sizes)]

    made = list(batches(rollouts, batch_tokens, torch.device("cpu")))

    assert sorted({w for batch in made for w in batch.advantages.tolist()}) == [float(n) for n in range(len(sizes))]
    assert sum(int((batch.targets >= 0).sum()) for batch in made) == sum(b for _, b in sizes)
    assert all(batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1 for batch in made)
