"""Measurements to Weights & Biases, for those who keep theirs there."""

import json
import uuid
from pathlib import Path
from typing import Any

RESULT_NEUTRAL = "copies measurements elsewhere"


class WandbLogger:
    """One W&B run a stage, grouped by the Chatmill run; a resumed stage continues its own."""

    def __init__(self, described: dict[str, Any]):
        import wandb

        logger = described["logger"]
        id_path = Path(described["work"]) / "scratch" / "wandb.json"
        known = json.loads(id_path.read_text()) if id_path.exists() else {"id": uuid.uuid4().hex[:8]}
        id_path.write_text(json.dumps(known))
        self.run = wandb.init(
            project=logger["project"],
            mode=logger["mode"],
            id=known["id"],
            resume="allow",
            name=f"{logger['name'] or logger['run']}/{described['stage']}",
            group=logger["run"],
            dir=described["store"],  # what lies in work is gone when the stage is published
            config=described["params"],
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.log(metrics, step=step)
