"""`run`: trains what the configuration describes; `run -m`: once for each combination of values."""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifacts.store import Artifact, Store
from pipeline.commands.parser import Parser
from pipeline.commands.plan import plan_table
from pipeline.config import compose as config
from pipeline.config.settings import StoreConfig
from pipeline.plan.session import Session, new_run_id, store_root
from pipeline.printing import PlainConsole, table
from pipeline.runner import machine, orchestration, server
from pipeline.runner.console import RunConsole, RunView
from pipeline.runner.run import Run, parameters_of
from pipeline.runner.tracking import habits


def run(arguments: list[str]) -> int:
    parser = Parser("run")
    parser.flag("-m", "--multirun", help="a run for each combination of values, as in sft.params.lr_frac=0.02,0.05")
    flags = parser.parse(arguments)
    overrides = usual(flags)
    return sweep(overrides) if flags.multirun else run_once(overrides)


def usual(flags: Namespace) -> list[str]:
    """The overrides of a run: those of the command line, those that fit this machine, and environment variables'."""
    if note := machine.idle_gpus_note(flags.given):
        print(note, file=sys.stderr)
    return [*habits.overrides(flags.given), *flags.overrides]


def run_once(overrides: list[str]) -> int:
    """Make what the overrides ask for. Where nothing is to be made, no Prefect server is started."""
    console = RunConsole()
    session = Session.open(overrides)
    plan, damaged = session.checked_plan()
    for line in damaged:
        warn(console, line)
    if running := plan.running():
        console.print(plan_table(plan, everything=False))
    else:
        console.print(f"Nothing to do: what this run makes is in {session.store.root}.", soft_wrap=True)
    url = server.configured_url()
    # The overrides are kept in the run's folder and in Prefect's database, where app.password must not be.
    kept = [override for override in overrides if not override.lstrip("+").startswith("app.")]
    with RunView(console) as view, Run.begin(session, plan, kept, view.events()) as run:
        for line in run.notes:
            warn(console, line)
        if running or url:
            orchestration.carry_out(run, parameters_of(session, kept), url, partial(warn, console))
    for name in plan.targets:
        if (step := plan.steps[name]).action == "cached" and step.artifact:  # stages that ran have printed theirs
            print_scores(console, session.store, step.artifact)
    print_ending(console, session.store, list(run.artifacts.values()))
    return 0


def warn(console: PlainConsole, line: str) -> None:
    console.print(line, style="yellow", soft_wrap=True)


def print_scores(console: Console, store: Store, artifact: Artifact) -> None:
    """Print the results of an evaluation as its stage did when it ran; nothing for other artifacts."""
    if artifact.module == "evaluate":
        from pipeline.stages.evaluate import lines

        for line in lines(json.loads((store.open(artifact) / "results.json").read_bytes())):
            console.print(f"{artifact.stages[0]}  {line}", soft_wrap=True)


def print_ending(console: Console, store: Store, artifacts: list[Artifact]) -> None:
    """Print the report's summary, and how to chat."""
    from pipeline.stages.report import summary

    for artifact in artifacts:
        if artifact.module == "report":
            if rows := summary(store.open(artifact)):
                console.print(table(rows[0], rows[1:], right=rows[0][1:]))
            console.print(f"Report: {artifact.folder / 'report.html'}", soft_wrap=True)
    if any(artifact.module in ("rl", "finetune") for artifact in artifacts):
        console.print("Chat:   python flows.py chat        (in the terminal: python flows.py chat --cli)")


def sweep(overrides: list[str]) -> int:
    """Run every combination through Hydra's sweepers and launchers. Returns the first exit code that is not 0."""
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

    folder = _store_of(overrides) / "runs" / "sweeps"
    before = sys.argv
    sys.argv = [before[0], "-m", *config.as_hydra_takes(overrides), f"hydra.sweep.dir={folder}/${{now:%Y%m%d-%H%M%S}}"]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with config.explained(overrides):
            hydra.main(config_path=str(Path(config.CONF)), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
    return next((code for code in codes if code), 0)


def _store_of(overrides: list[str]) -> Path:
    """The store of the sweep's runs; the usual one where they have several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    root = StoreConfig.root
    given = config.as_hydra_takes([o for o in overrides if "store.root=" in o])
    with config.explained(overrides):
        for override in OverridesParser.create().parse_overrides(given):
            if override.key_or_group == "store.root" and not override.is_sweep_override():
                root = str(override.value())
    return store_root(root)
