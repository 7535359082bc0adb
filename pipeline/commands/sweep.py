"""`-m`: one run for each combination of values, through Hydra's sweepers and launchers."""

import os
import sys
from pathlib import Path
from typing import Any

from pipeline.config import compose as config
from pipeline.config.settings import StoreConfig
from pipeline.plan.session import new_run_id, store_root


def sweep(overrides: list[str]) -> int:
    """Run every combination; what they share is made once. Returns the first exit code that is not 0."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    codes: list[int] = []
    sweep_id = new_run_id()

    def job(_: Any) -> None:
        from pipeline.commands.cli import main

        chosen = list(HydraConfig.get().overrides.task)
        print(f"\n=== {' '.join(chosen)}", flush=True)
        codes.append(main(["run", *chosen, f"run.sweep={sweep_id}"]))
        if codes[-1] == 130:
            raise KeyboardInterrupt

    folder = _root(overrides) / "runs" / "sweeps"
    before = sys.argv
    sys.argv = [before[0], "-m", *config.as_hydra_takes(overrides), f"hydra.sweep.dir={folder}/${{now:%Y%m%d-%H%M%S}}"]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with config.explained(overrides):
            hydra.main(config_path=str(Path(config.CONF)), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
    return next((code for code in codes if code), 0)


def _root(overrides: list[str]) -> Path:
    """The store of the sweep's runs; the usual one where they have several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    root = StoreConfig.root
    given = config.as_hydra_takes([o for o in overrides if "store.root=" in o])
    with config.explained(overrides):
        for override in OverridesParser.create().parse_overrides(given):
            if override.key_or_group == "store.root" and not override.is_sweep_override():
                root = str(override.value())
    return store_root(root)
