"""What Hydra itself does: `-m`, a run for each combination of values, and `--info` about how settings are composed."""

import os
import sys
from collections.abc import Callable
from typing import Any

from pipeline.config import compose as config
from pipeline.config.quoting import chosen, parsed_override
from pipeline.config.settings import StoreConfig
from pipeline.plan.session import new_run_id, store_root

SWEPT = "hydra.sweeper.params="


def sweep(overrides: list[str]) -> int:
    """Run every combination; what they share is made once. Returns the first exit code that is not 0."""
    from hydra.core.hydra_config import HydraConfig

    codes: list[int] = []
    sweep_id = new_run_id()
    own_folders = [override for override in overrides if override.startswith("hydra.searchpath=")]

    def job(_: Any) -> None:
        from pipeline.commands.cli import main

        combination = [override.removeprefix("++") for override in HydraConfig.get().overrides.task]
        print(f"\n=== {' '.join(combination)}", flush=True)
        codes.append(main(["run", *own_folders, *combination, f"run.sweep={sweep_id}"]))
        if codes[-1] == 130:
            raise KeyboardInterrupt

    overrides = _with_sweeper_params(overrides)
    folder = _root(overrides) / "runs" / "sweeps"
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _run_hydra(
        ["-m", *config.as_hydra_takes(overrides), f"hydra.sweep.dir={folder}/${{now:%Y%m%d-%H%M%S}}"], job, overrides
    )
    return next((code for code in codes if code), 0)


def show(flag: str, overrides: list[str]) -> int:
    """Hydra's --info and --cfg."""
    _run_hydra([flag, *config.as_hydra_takes(overrides)], lambda _: None, overrides)
    return 0


def _run_hydra(arguments: list[str], job: Callable[[Any], None], overrides: list[str]) -> None:
    import hydra

    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        with config.explained(overrides):
            hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before


def _with_sweeper_params(overrides: list[str]) -> list[str]:
    """hydra.sweeper.params={NAME: VALUES, ...} as NAME=VALUES, but for sweepers other than Hydra's basic one."""
    if chosen(overrides, "hydra/sweeper="):
        return overrides
    found = []
    for override in overrides:
        parsed = parsed_override(override) if override.lstrip("+").startswith(SWEPT) else None
        values = parsed.value() if parsed else None
        found += [f"{name}={value}" for name, value in values.items()] if isinstance(values, dict) else [override]
    return found


def _root(overrides: list[str]) -> Any:
    """The store of the sweep's runs; the usual one where they have several."""
    root = StoreConfig.root
    for override in config.as_hydra_takes(overrides):
        if override.lstrip("+").startswith("store.root=") and (parsed := parsed_override(override)):
            root = root if parsed.is_sweep_override() else str(parsed.value())
    return store_root(root)
