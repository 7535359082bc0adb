"""What each verb does. A verb gets its own flags parsed and the rest of the line as overrides."""

import argparse
import sys
import webbrowser
from collections.abc import Callable
from functools import partial

from pipeline.commands import chat as chat_command
from pipeline.commands import evaluate as evaluate_command
from pipeline.commands import export, inspect_store
from pipeline.commands.cli import STOPPED, VERBS, Parser
from pipeline.errors import Corrupt, UserError
from pipeline.plan.session import Session
from pipeline.printing import PlainConsole, say
from pipeline.runner import gpus, orchestration, server, tracking
from pipeline.runner import machine as hardware
from pipeline.runner.run import Run, parameters_of
from pipeline.runner.tracking import habits


def run_verb(verb: str, arguments: list[str]) -> int:
    settings = "NAME=VALUE changes a setting: `python flows.py plan --config` shows all of them."
    parser = Parser(prog=f"python flows.py {verb}", description=VERBS[verb], epilog=settings)
    action, declare = ACTIONS[verb]
    declare(parser)
    flags, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if "=" in a or (a.startswith(("~", "+")) and not a.startswith("~/"))]
    names = [a for a in rest if a not in overrides]
    if wrong := [n for n in names if n.startswith("-")] or (names if not hasattr(flags, "takes_names") else []):
        raise UserError(
            f"{wrong[0]!r} means nothing to {verb}", fix=f"`python flows.py {verb} --help` shows what does."
        )
    flags.names = names
    found = hardware.launch_overrides(overrides)
    if verb in ("run", "plan"):
        found += habits.overrides(overrides)
        if note := hardware.idle_gpus_note(overrides):
            print(note, file=sys.stderr)
    return action(flags, [*found, *overrides])


# --- run and plan


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    if flags.multirun:
        from pipeline.commands.sweep import sweep

        return sweep(overrides)
    return run_once(overrides)


def run_once(overrides: list[str]) -> int:
    """Make what the overrides ask for. Where nothing is to be made, no Prefect server is started."""
    from pipeline.runner.console import RunConsole, RunView, plan_table

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
            inspect_store.print_scores(console, session.store, step.artifact)
    inspect_store.print_ending(console, session.store, list(run.artifacts.values()))
    return 0


def warn(console: PlainConsole, line: str) -> None:
    console.print(line, style="yellow", soft_wrap=True)


def plan(flags: argparse.Namespace, overrides: list[str]) -> int:
    from pipeline.numbers import duration, money
    from pipeline.runner.console import plan_table

    session = Session.open(overrides)
    if flags.config:
        import yaml

        print(yaml.safe_dump(session.composed, sort_keys=False), end="")
        return 0
    made = session.plan(online=False)
    console = PlainConsole()
    console.print(plan_table(made))
    if said := session.store.format_note():
        warn(console, said)
    running = made.running()
    note = tracking.check(session.settings.logger, online=False)[1]
    if running and note:
        console.print(note, style="yellow", soft_wrap=True)
    if lacking := next((f"{s.name}: {missing}" for s in running if (missing := gpus.lacking(s.stage))), ""):
        console.print(f"Cannot run here: {lacking}.", style="yellow", soft_wrap=True)
    known = [s for s in running if s.seconds is not None]
    told = f": {duration(sum(s.seconds or 0.0 for s in known))}, {money(made.usd())}" if known else ""
    if unknown := len(running) - len(known):
        were = "1 was" if unknown == 1 else f"{unknown} were"
        told += f" for {len(known)} of them; {were} never timed" if known else "; none was ever timed"
    console.print(
        f"\n{len(running)} of {len(made.steps)} stages would run{told}.\nStore: {session.store.root}", soft_wrap=True
    )
    return 0


def why(flags: argparse.Namespace, overrides: list[str]) -> int:
    session = Session.open(overrides)
    session.dag.check_names(flags.names, "why")
    made = session.plan(online=False, targets=flags.names)
    inspect_store.print_why(PlainConsole(), made, flags.names)
    return 0


# --- looking


def status(flags: argparse.Namespace, overrides: list[str]) -> int:
    inspect_store.print_status(PlainConsole(), Session.open(overrides).store)
    return 0


def log(flags: argparse.Namespace, overrides: list[str]) -> int:
    store = Session.open(overrides).store
    try:
        for text in inspect_store.read_log(store, _one_name(flags, "log"), flags.follow):
            say(text, end="")
    except KeyboardInterrupt:
        return STOPPED
    return 0


def show(flags: argparse.Namespace, overrides: list[str]) -> int:
    store = Session.open(overrides).store
    inspect_store.print_artifact(PlainConsole(), store.find_by_name(_one_name(flags, "show")), as_json=flags.json)
    return 0


def ls(flags: argparse.Namespace, overrides: list[str]) -> int:
    console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=200)  # what is piped may be searched
    inspect_store.print_list(console, Session.open(overrides).store, flags.names)
    return 0


def report(flags: argparse.Namespace, overrides: list[str]) -> int:
    from rich.markdown import Markdown

    store = Session.open(overrides).store
    folder = store.open(store.find_by_name(flags.names[0] if flags.names else "report", ("report",)))
    if flags.open:
        webbrowser.open((folder / "report.html").as_uri())
    else:
        text = (folder / "report.md").read_text()
        PlainConsole().print(Markdown(text, hyperlinks=False)) if sys.stdout.isatty() else say(text, end="")
    say(folder / "report.html", file=sys.stderr)
    return 0


# --- changing


def rm(flags: argparse.Namespace, overrides: list[str]) -> int:
    store = Session.open(overrides).store
    if not flags.names:
        raise UserError("names nothing to remove", "rm", "`ls` shows keys.")
    for removed in inspect_store.remove(store, flags.names):
        say(f"removed {removed}")
    return 0


def verify(flags: argparse.Namespace, overrides: list[str]) -> int:
    store = Session.open(overrides).store
    chosen = [store.find_by_name(name) for name in flags.names] or list(store.all())
    bad = 0
    for folder, error in store.unreadable() if not flags.names else ():
        bad += 1
        say(f"BAD   {folder.parent.name}/{folder.name}  {store.set_aside(folder, error)}")
    if not chosen and not bad:
        say(f"{store.root} holds nothing yet.")
    for artifact in chosen:
        try:
            store.find(artifact.module, artifact.key)
            hashed = store.verify(artifact, everything=True)
            say(f"good  {artifact.module}/{artifact.key}  {hashed} files")
        except Corrupt as error:
            bad += 1
            say(f"BAD   {artifact.module}/{artifact.key}  {store.set_aside(artifact.folder, error.what)}")
    return 1 if bad else 0


def gc(flags: argparse.Namespace, overrides: list[str]) -> int:
    store = Session.open(overrides).store
    freed = inspect_store.collect_garbage(store, dry_run=flags.dry_run)
    for path, size in freed:
        say(f"{'would delete' if flags.dry_run else 'deleted'} {path} ({size / 1e6:.1f} MB)")
    print(f"{sum(size for _, size in freed) / 1e6:.1f} MB in {len(freed)} places")
    return 0


def accept(flags: argparse.Namespace, overrides: list[str]) -> int:
    session = Session.open(overrides)
    session.dag.check_names(flags.names, "accept")
    if not flags.names or not flags.why:
        raise UserError("needs a stage and a reason", "accept", "python flows.py accept STAGE --why TEXT")
    for name in flags.names:
        step = session.plan(online=False, targets=[name]).steps[name]
        if step.artifact is not None:
            say(f"{name}: {step.key} is there already")
        elif not step.code_only or step.previous is None or step.wanted is None:
            reason = step.why or "never made"
            raise UserError(f"more than code differs ({reason})", name, "Only a change of code can be accepted.")
        else:
            session.store.memory.accept(step.stage.run, step.wanted, step.previous.key, flags.why)
            say(f"{name}: {step.previous.key} counts as {step.wanted}: {flags.why}")
    return 0


def chat(flags: argparse.Namespace, overrides: list[str]) -> int:
    return chat_command.chat(Session.open(overrides), overrides, flags)


def verify_resume(flags: argparse.Namespace, overrides: list[str]) -> int:
    from pipeline.commands.verify_resume import verify_resume

    name, steps = _one_name(flags, "verify-resume"), flags.steps or "40"
    if not steps.isdigit() or int(steps) < 10:
        raise UserError(f"--steps is {steps}", "verify-resume", "It takes a number, and no fewer than 10.")
    return 0 if verify_resume(Session.open(overrides), name, int(steps), lambda line: print(line, flush=True)) else 1


def bench(flags: argparse.Namespace, overrides: list[str]) -> int:
    from pipeline.bench import command

    return command.run(flags.names, overrides)


def doctor(flags: argparse.Namespace, overrides: list[str]) -> int:
    from pipeline.commands.doctor import check

    return check(Session.open(overrides))


def _one_name(flags: argparse.Namespace, verb: str) -> str:
    if len(flags.names) != 1:
        raise UserError("needs one name", verb, "`ls` and `status` show names.")
    return str(flags.names[0])


Declare = Callable[[argparse.ArgumentParser], None]


def _flags(*declared: tuple[str, ...], names: bool = False, **texts: str) -> Declare:
    """A function that declares on/off flags: the words for each, and what it does."""

    def declare(parser: argparse.ArgumentParser) -> None:
        for *words, meaning in declared:
            parser.add_argument(*words, action="store_true", help=meaning)
        for text, help_text in texts.items():
            parser.add_argument(f"--{text}", help=help_text)
        if names:
            parser.set_defaults(takes_names=True)

    return declare


ACTIONS: dict[str, tuple[Callable[[argparse.Namespace, list[str]], int], Declare]] = {
    "run": (
        run,
        _flags(("-m", "--multirun", "a run for each combination of values, as in sft.params.lr_frac=0.02,0.05")),
    ),
    "plan": (plan, _flags(("--config", "print all settings with their values instead"))),
    "why": (why, _flags(names=True)),
    "status": (status, _flags()),
    "log": (log, _flags(("-f", "--follow", "also print what is added, until the stage ends"), names=True)),
    "show": (show, _flags(("--json", "the manifest as it is stored"), names=True)),
    "ls": (ls, _flags(names=True)),
    "rm": (rm, _flags(names=True)),
    "report": (report, _flags(("--open", "show it in the browser"), names=True)),
    "verify": (verify, _flags(names=True)),
    "gc": (gc, _flags(("--dry-run", "only say what would be deleted"))),
    "accept": (accept, _flags(names=True, why="the reason, kept with the artifact")),
    "chat": (chat, chat_command.declare),
    "verify-resume": (verify_resume, _flags(names=True, steps="how many to train; 40 where the stage has as many")),
    "eval": (evaluate_command.evaluate, evaluate_command.declare),
    "export": (export.export, export.declare),
    "bench": (bench, _flags(names=True)),
    "doctor": (doctor, _flags()),
}
