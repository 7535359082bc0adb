"""TensorBoard: event files in store/tensorboard/RUN/STAGE."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.durable import keep_json, read_fields
from data.trust import below
from pipeline.config.settings import LoggerConfig
from pipeline.runner.tracking import about

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check(config: LoggerConfig, online: bool) -> tuple[LoggerConfig, str]:
    """Event files are written by the tensorboard package, which is an extra."""
    if importlib.util.find_spec("tensorboard") is not None:
        return config, ""
    return replace(config, kind="none"), "logger=tensorboard has no effect: run `pip install tensorboard`."


class TensorBoard:
    def __init__(self, described: dict[str, Any]):
        self.described = described
        self.writer: SummaryWriter | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.writer = self.writer or self._open(step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a later attempt does not log again what precedes its checkpoint

    def summary(self, metrics: dict[str, float]) -> None:
        if self.writer is None:
            self.log(0, metrics)

    def close(self, done: bool) -> None:
        if self.writer:
            self.writer.close()

    def _open(self, step: int) -> "SummaryWriter":
        """Continue the stage's events, where readers drop the steps of an earlier attempt from `step` on."""
        from torch.utils.tensorboard import SummaryWriter

        described = self.described
        path = Path(described["work"]) / "scratch" / "tensorboard.json"
        known = read_fields(path, {"name": ""})["name"]  # a resume may be of another run
        name = known or f"{described['logger']['run']}/{described['stage']}"
        writer = SummaryWriter(str(below(Path(described["store"], "tensorboard"), name, str(path))), purge_step=step)
        if not known:
            keep_json(path, {"name": name})
            writer.add_text("about", f"```\n{json.dumps(about(described), indent=1)}\n```", step)
        return writer
