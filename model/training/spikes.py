"""Guards against steps that harm a run, or do nothing.

A gradient far above the usual is dropped. A loss far above the usual ends the run; so does a model that does not learn.
"""

import math

NORMS_KNOWN = 20  # steps before a norm can be called unusual
LOSSES_KNOWN = 10  # logged losses before one can be called a spike
MEMORY = 0.98  # of the running mean of gradient norms
STILL_STEPS = 50  # without a gradient, or at the loss of guessing, before a run counts as dead
STILL_NATS = 1e-3  # from the loss of guessing; a step at any useful rate goes further


class NormGuard:
    """Which gradient norms are too large: those above `factor` times the running mean of earlier ones; None: no norm.

    mean and count are the state that a resume needs. A dropped norm enters the mean as the limit it exceeded, so that
    a lasting change of level is followed in the end.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.mean, self.count = 0.0, 0

    @property
    def active(self) -> bool:
        return self.factor is not None

    def limit(self) -> float:
        """Infinity while there is none."""
        if self.factor is None or self.count < NORMS_KNOWN:
            return math.inf
        return self.factor * self.mean

    def note(self, norm: float) -> None:
        """Count a step's norm in."""
        if math.isfinite(norm):
            limit = self.limit()
            self.count += 1
            weight = max(1 - MEMORY, 1 / self.count)
            self.mean += weight * (min(norm, limit) - self.mean)


def is_spike(loss: float, smooth: float, logged: int) -> bool:
    """Return True if a finite loss is that of a run that has diverged: over twice the smoothed one, and 2 nats more."""
    return logged >= LOSSES_KNOWN and loss > 2 * smooth + 2


def is_guessing(loss: float, vocab_size: int) -> bool:
    """Return True if the loss is that of a model that finds every token equally likely."""
    return abs(loss - math.log(vocab_size)) < STILL_NATS
