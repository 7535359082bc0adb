"""Copies of measurements for other tools. No tracker can end a stage: its error is reported once, and the stage
continues without it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.config.settings import LoggerConfig
from pipeline.job import Logger

Say = Callable[[str], None]


def check(config: LoggerConfig, online: bool) -> tuple[LoggerConfig, str]:
    """The settings that can be met, and what to tell the user if they differ from those asked for.

    online: whether the tracker's service may be asked if it is there.
    """
    if config.kind == "none" or config.mode == "disabled":
        return replace(config, kind="none"), ""
    from pipeline.runner.tracking import tensorboard, weights_and_biases

    tracker = {"wandb": weights_and_biases, "tensorboard": tensorboard}[config.kind]
    try:
        return tracker.check(config, online)
    except Exception:  # the stage says what is wrong, and continues
        return config, ""


def open_loggers(described: dict[str, Any], scores: bool, say: Say) -> list[Logger]:
    """The trackers that job.json asks for. scores: True if the stage returns measurements, as evaluations do."""
    kind = (described.get("logger") or {}).get("kind", "none")
    if kind == "none":
        return []

    def start() -> Logger:
        from pipeline.runner.tracking.tensorboard import TensorBoard
        from pipeline.runner.tracking.weights_and_biases import WeightsAndBiases

        return WeightsAndBiases(described, say) if kind == "wandb" else TensorBoard(described)

    return [_Harmless(kind, start, scores, say)]


class _Harmless:
    """A tracker that starts at the first measurement, and is given up at the first error."""

    def __init__(self, name: str, start: Callable[[], Logger], scores: bool, say: Say):
        self.name, self.start, self.scores, self.say = name, start, scores, say
        self.logger: Logger | None = None
        self.broken = False

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._attempt(lambda logger: logger.log(step, numbers(metrics)))

    def summary(self, metrics: dict[str, Any]) -> None:
        if self.logger or self.scores:
            self._attempt(lambda logger: logger.summary(numbers(metrics)))

    def close(self, done: bool) -> None:
        if self.logger:
            self._attempt(lambda logger: logger.close(done))

    def _attempt(self, do: Callable[[Logger], None]) -> None:
        if self.broken:
            return
        try:
            self.logger = self.logger or self.start()
            do(self.logger)
        except (Exception, SystemExit) as error:
            self.broken = True
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"logger={self.name} failed, the stage continues without it ({why})")


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that can be drawn."""
    return {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def about(described: dict[str, Any]) -> dict[str, Any]:
    """Facts to keep beside the measurements of a stage: what it is, and what it was made of."""
    context = described.get("context") or {}
    return {
        "stage": described["stage"],
        "key": described["key"],
        "recipe": context.get("recipe"),
        "commit": context.get("git"),
        "inputs": {name: "/".join(folder.split("/")[-2:]) for name, folder in described["inputs"].items()},
        "params": described["params"],
        "launch": described["launch"],
    }
