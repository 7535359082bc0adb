"""The optimiser's step by itself: Muon on the blocks' matrices, AdamW on the rest, and its share of a training step.

Gradients are random, as zeros would be cheaper. The share is of forward, backward and the step measured alike, without
the loop around them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.bench import configs
from pipeline.bench.phases import phase_seconds
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians
from pipeline.bench.train_step import ways
from pipeline.bench.trainings import Training, prepared

if TYPE_CHECKING:
    from model.optim.buckets import Bucket
    from model.optim.rules import Rule


def measure(bench: Bench) -> Result:
    result: Result = {}
    for name in configs.names(bench):
        config = configs.compose(bench, configs.JOBS[name])
        compiled = ways(bench)[-1]
        with prepared(bench, config, 10, compiled) as training:
            phase_seconds(training, 1)  # compiles
            parts = phase_seconds(training, bench.settings.repeats)
            seconds = medians(in_turns(rule_cases(training), bench.settings.repeats, bench.device))
            result[name] = {
                "step_ms": parts["optimiser"] * 1e3,
                **{f"{rule}_ms": s * 1e3 for rule, s in seconds.items()},
                "share_of_step": parts["optimiser"] / sum(parts.values()),
                "with": "compiled" if compiled else "eager",
            }
    return result


def rule_cases(training: Training) -> dict[str, Callable[[], object]]:
    """Updating all parameters of each rule, by the rule's name."""
    from model.training.schedule import Schedule

    rates = Schedule(training.work.config.schedule, training.work.steps).at(0)
    parts: dict[str, list[tuple[Bucket, Rule]]] = {}
    for bucket, rule in training.optimizer.parts:
        parts.setdefault(type(rule).__name__.lower(), []).append((bucket, rule))

    def update(rules: "list[tuple[Bucket, Rule]]") -> None:
        import torch

        with torch.no_grad():
            for _, rule in rules:
                rule.update(rates, 1)

    for bucket, _ in training.optimizer.parts:
        bucket.grads.normal_(std=1e-3)
    return {name: lambda rules=rules: update(rules) for name, rules in parts.items()}  # type: ignore[misc]
