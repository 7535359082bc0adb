"""Copies of measurements for W&B and TensorBoard. A tracker cannot end a stage: its error is reported once, and the
stage continues without it."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.config.quoting import chosen, quote
from pipeline.config.settings import LoggerConfig
from pipeline.errors import UserError
from pipeline.job import Logger

Say = Callable[[str], None]
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def environment_overrides(given: list[str]) -> list[str]:
    """Overrides from WANDB_RUN, WANDB_MODE and WANDB_PROJECT, as in nanochat, unless the command line sets the same.

    WANDB_RUN=dummy means no W&B. Raises UserError for a mode that does not exist.
    """
    found = []
    name = os.environ.get("WANDB_RUN", "")
    if name not in ("", "dummy"):
        if not chosen(given, "logger=", "logger.kind="):
            found.append("logger=wandb")
        if not chosen(given, "run.name="):
            found.append(f"run.name={quote(name)}")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in MODES and not chosen(given, "logger.mode="):
        found.append(f"logger.mode={MODES[mode]}")
    elif mode and mode not in MODES and any("wandb" in override for override in [*found, *given]):
        raise UserError(f"is {mode!r}", "WANDB_MODE", "Set online, offline or disabled.")
    if (project := os.environ.get("WANDB_PROJECT")) and not chosen(given, "logger.project="):
        found.append(f"logger.project={quote(project)}")
    return found


def check(config: LoggerConfig, online: bool) -> tuple[LoggerConfig, str]:
    """The settings that can be met, and a message for the user if they are not the ones asked for.

    online: True if the tracker's service may be contacted.
    """
    if config.kind == "none" or config.mode == "disabled":
        return replace(config, kind="none"), ""
    from pipeline.runner import trackers

    try:
        return trackers.check_wandb(config, online) if config.kind == "wandb" else trackers.check_tensorboard(config)
    except Exception:  # the stage reports what is wrong, and continues
        return config, ""


def open_loggers(described: dict[str, Any], scores: bool, say: Say) -> list[Logger]:
    """The trackers that job.json asks for. scores: True if the stage returns measurements, as evaluations do."""
    kind = (described.get("logger") or {}).get("kind", "none")
    if kind == "none":
        return []

    def start() -> Logger:
        from pipeline.runner.trackers import TensorBoard, WeightsAndBiases

        return WeightsAndBiases(described, say) if kind == "wandb" else TensorBoard(described)

    return [_Harmless(kind, start, scores, say)]


class _Harmless:
    """A tracker that starts at the first measurement and stops at its first error."""

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
            self.say(f"logger={self.name} failed. The stage continues without it ({why})")


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that can be plotted."""
    return {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
