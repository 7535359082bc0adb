"""Settings from the environment variables that users of W&B and nanochat are used to."""

import os

from pipeline.config.quoting import chosen, quote
from pipeline.errors import UserError

MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def overrides(given: list[str]) -> list[str]:
    """WANDB_RUN, WANDB_MODE and WANDB_PROJECT as overrides, except where the command line sets the same.

    WANDB_RUN=dummy means no W&B, as in nanochat. Raises UserError for a mode that does not exist.
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
