"""Signs of a run that goes wrong.

A step with a gradient far above the usual is dropped. A loss far above the usual ends the run, as does a model that
does not learn.
"""

import math

NORMS_KNOWN = 20  # steps before a norm can be called unusual
LOSSES_KNOWN = 10  # logged losses before one can be called a spike
MEMORY = 0.98  # of the running mean of gradient norms
STILL_STEPS = 50  # without a gradient, or at the loss of guessing, before a run counts as dead
STILL_NATS = 1e-3  # distance from the loss of guessing; one step at any useful rate moves it further


class NormGuard:
    """Tells gradient norms that are too large: above `factor` times the running mean of earlier ones. None: no limit.

    mean and count are the state that a resume needs. A dropped norm enters the mean as the limit that it exceeded, so
    that the limit follows a lasting change of level in the end.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.mean, self.count = 0.0, 0

    @property
    def active(self) -> bool:
        return self.factor is not None

    def limit(self) -> float:
        """The largest norm accepted now; infinity while too few are known."""
        if self.factor is None or self.count < NORMS_KNOWN:
            return math.inf
        return self.factor * self.mean

    def note(self, norm: float) -> None:
        """Include a step's norm in the mean."""
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
