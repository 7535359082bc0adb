"""Policy gradients on sampled completions: advantages within a group, and the loss of the tokens the model wrote.

GRPO (Shao et al., 2024) without its trust region unless asked for: advantage r - mean(r), no division by the standard
deviation, no KL, no clipping, and every token of a step counts the same (token-level normalisation, as in DAPO).
nanochat normalises over the answers to each problem, so that tokens of a problem with short answers weigh more there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.gpt import GPT

HEAD_LOGITS = 1 << 23  # logits held at once
IGNORE = -1
EPS = 1e-6


@dataclass(frozen=True)
class Rollout:
    """A completion and its reward. trained[i]: tokens[i] was written by the model, not forced by a tool."""

    prompt: list[int]
    tokens: list[int]
    trained: list[bool]
    reward: float
    advantage: float
    logprobs: list[float] | None = None  # of tokens, by the policy that wrote them

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Objective:
    """clip: PPO's, of the probability ratio to the policy that wrote the tokens; kl: weight of the divergence from the
    model that the run started with."""

    clip: float | None = None
    kl: float = 0.0


@dataclass(frozen=True)
class RolloutBatch:
    """Rows padded on the right. tokens, targets: (B, T) int64, a target of -1 is not trained on.

    advantages, old: (M,) float32, of the M other targets, in row order. old: log-probabilities by the policy that wrote
    the tokens, None where they were not kept.
    """

    tokens: Tensor
    targets: Tensor
    advantages: Tensor
    old: Tensor | None


def advantages(rewards: Tensor, divide_by_std: bool = False) -> Tensor:
    """(groups, samples) -> the same: how much better than its group's mean each sample did."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + EPS) if divide_by_std else centred


def batches(rollouts: list[Rollout], batch_tokens: int, device: torch.device) -> Iterator[RolloutBatch]:
    """Micro-batches of about batch_tokens padded tokens, of rollouts of similar length."""
    ordered = sorted(rollouts, key=lambda rollout: rollout.length)
    while ordered:
        count = max(1, min(len(ordered), batch_tokens // ordered[-1].length))
        yield _pad(ordered[-count:], device)
        del ordered[-count:]


def _pad(rollouts: list[Rollout], device: torch.device) -> RolloutBatch:
    width = max(rollout.length for rollout in rollouts) - 1
    tokens = torch.zeros(len(rollouts), width, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORE)
    weights, old = [], []
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor([*rollout.prompt, *rollout.tokens])
        tokens[row, : len(ids) - 1] = ids[:-1]
        written = torch.tensor(rollout.trained)
        start = len(rollout.prompt) - 1
        targets[row, start : len(ids) - 1] = torch.where(written, ids[len(rollout.prompt) :], IGNORE)
        weights += [rollout.advantage] * int(written.sum())
        if rollout.logprobs is not None:
            old += [value for value, mine in zip(rollout.logprobs, rollout.trained) if mine]
    kept = torch.tensor(old).to(device) if len(old) == len(weights) else None
    return RolloutBatch(tokens.to(device), targets.to(device), torch.tensor(weights).to(device), kept)


def token_logprobs(model: GPT, batch: RolloutBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(M,) float32 twice: log-probability of each trained token, and the entropy (nats, no gradient) at its position.

    temperature: the one that tokens were drawn at. The policy is the model at this temperature.
    """
    mask = batch.targets != IGNORE
    hidden, targets = model.hidden(batch.tokens)[mask], batch.targets[mask]
    size = max(1, HEAD_LOGITS // model.config.vocab_size)
    logprobs, entropies = [], []
    for part, wanted in zip(hidden.split(size), targets.split(size)):
        # Logits of many chunks would take too much memory: they are made again in the backward pass.
        if len(hidden) > size and torch.is_grad_enabled():
            logprob, entropy = checkpoint(_head, model, part, wanted, temperature, use_reentrant=False)
        else:
            logprob, entropy = _head(model, part, wanted, temperature)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def _head(model: GPT, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = model.head(hidden)
    logprobs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def loss(logprobs: Tensor, batch: RolloutBatch, objective: Objective, start: Tensor | None) -> Tensor:
    """Sum over tokens of what is to be minimised; a float32 scalar.

    start: (M,) log-probabilities by the model the run started with, needed where objective.kl is not 0.
    """
    if objective.clip is None or batch.old is None:
        # On-policy the ratio is 1, where its gradient is that of the log-probability.
        value = batch.advantages * logprobs
    else:
        ratio = (logprobs - batch.old).exp()
        clipped = ratio.clamp(1 - objective.clip, 1 + objective.clip)
        value = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    if objective.kl and start is not None:
        value = value - objective.kl * divergence(logprobs, start)
    return -value.sum()


def divergence(logprobs: Tensor, start: Tensor) -> Tensor:
    """Each token's estimate of KL(policy || start), never negative (Schulman, 2020: k3)."""
    difference = start - logprobs
    return difference.exp() - difference - 1
