"""What changes over the steps: learning rate, momentum, weight decay. Pure functions of the step."""

from dataclasses import dataclass

from model.config import ScheduleConfig

REFERENCE_BATCH = 2**19  # tokens; the batch that the published rates were found at


@dataclass(frozen=True)
class Rates:
    """The optimiser's settings for one step; lr and weight_decay multiply what OptimConfig says."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Schedule:
    config: ScheduleConfig
    steps: int

    def at(self, step: int) -> Rates:
        """Rates of the step after `step` finished ones, 0 <= step < steps."""
        config, steps = self.config, self.steps
        down = round(config.warmdown_frac * steps)
        left = min(1.0, (steps - step) / down) if down else 1.0
        lr = min(1.0, (step + 1) / (config.warmup_steps + 1)) * (left + (1 - left) * config.final_lr_frac)
        first, last = config.momentum
        done = min(1.0, step / config.momentum_steps) if config.momentum_steps else 1.0
        momentum = first + (last - first) * done
        if config.momentum_final is not None and left < 1.0:
            momentum = last + (config.momentum_final - last) * (1 - left)
        decay = 1.0 - step / steps if config.weight_decay_to_zero else 1.0
        return Rates(lr, momentum, decay)


def batch_factor(config: ScheduleConfig, total_batch_tokens: int) -> float:
    """What every rate is multiplied with for the size of the batch [nanochat, 2026]."""
    return (total_batch_tokens / REFERENCE_BATCH) ** 0.5 if config.scale_lr_with_batch else 1.0
