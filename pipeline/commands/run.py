"""`run`: trains what the configuration describes; `run -m`: once for each combination of values."""

import json
import sys
from argparse import Namespace
from functools import partial

import yaml
from rich.console import Console

from pipeline.artifacts.store import Artifact, Store
from pipeline.commands import sweep
from pipeline.commands.parser import Parser
from pipeline.commands.plan import plan_table
from pipeline.config import compose as config
from pipeline.plan.session import Session
from pipeline.printing import PlainConsole, say, table
from pipeline.runner import machine, orchestration, server, tracking
from pipeline.runner.console import RunConsole, RunView
from pipeline.runner.run import Run, parameters_of


def run(arguments: list[str]) -> int:
    parser = Parser("run")
    parser.flag("-m", "--multirun", help="a run for each combination of values, as in sft.params.lr_frac=0.02,0.05")
    parser.add_argument("--cfg", choices=["job", "hydra", "all"], help="print the settings as plain YAML instead")
    about = ["defaults", "defaults-tree", "config", "plugins", "searchpath", "all"]
    parser.add_argument("--info", choices=about, help="print how Hydra composes the settings; defaults: their files")
    flags = parser.parse(arguments)
    overrides = usual(flags)
    if flags.multirun:
        return sweep.sweep(overrides)
    if flags.cfg == "job":
        say(yaml.safe_dump(config.compose(overrides), sort_keys=False, allow_unicode=True), end="")
        return 0
    if flags.cfg or flags.info:
        return sweep.show(f"--cfg={flags.cfg}" if flags.cfg else f"--info={flags.info}", overrides)
    return run_once(overrides)


def usual(flags: Namespace) -> list[str]:
    """The overrides of a run: those of the command line, those that fit this machine, and environment variables'."""
    if note := machine.idle_gpus_note(flags.given):
        print(note, file=sys.stderr)
    return [*tracking.environment_overrides(flags.given), *flags.overrides]


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
        from pipeline.stages.evaluate import summary

        for line in summary(json.loads((store.open(artifact) / "results.json").read_bytes()))[1]:
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
