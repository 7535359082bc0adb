"""Settings from the environment variables that users of W&B and nanochat are used to."""

import os

from pipeline.errors import UserError

RESULT_NEUTRAL = "reads settings; the values that matter enter keys themselves"

MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def overrides(given: list[str]) -> list[str]:
    """WANDB_RUN, WANDB_MODE and WANDB_PROJECT as overrides, but for those that the command line decides.

    WANDB_RUN=dummy means no W&B, as in nanochat. Raises UserError for a mode that does not exist.
    """

    def decided(*names: str) -> bool:
        return any(override.lstrip("+~").startswith(names) for override in given)

    found = []
    name = os.environ.get("WANDB_RUN", "")
    if name not in ("", "dummy"):
        if not decided("logger=", "logger.kind="):
            found.append("logger=wandb")
        if not decided("run.name="):
            found.append(f"run.name={_quoted(name)}")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in MODES and not decided("logger.mode="):
        found.append(f"logger.mode={MODES[mode]}")
    elif mode and mode not in MODES and any("wandb" in override for override in [*found, *given]):
        raise UserError(f"is {mode!r}", "WANDB_MODE", "Set online, offline or disabled.")
    if (project := os.environ.get("WANDB_PROJECT")) and not decided("logger.project="):
        found.append(f"logger.project={_quoted(project)}")
    return found


def _quoted(text: str) -> str:
    """Text that Hydra's grammar takes literally."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
