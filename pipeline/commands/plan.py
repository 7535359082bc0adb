"""`plan`, `why` and `accept`: what would run, why, and old artifacts that are kept after a change of code."""

import json
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.commands.parser import Parser
from pipeline.config.show import commented
from pipeline.errors import UserError
from pipeline.numbers import duration, money
from pipeline.plan.plan import Plan, Step
from pipeline.plan.session import Session
from pipeline.printing import PlainConsole, say, table
from pipeline.runner import gpus, tracking

WHY_CHARACTERS = 80  # in the table
STYLES = {"run": "bold", "cached": "green", "idle": "dim"}
WORDS = {"run": "run", "cached": "cached", "idle": "not needed"}


def plan(arguments: list[str]) -> int:
    from pipeline.commands.run import usual

    parser = Parser("plan")
    parser.flag("--config", help="print all settings instead: value, origin and meaning")
    flags = parser.parse(arguments)
    overrides = usual(flags)
    session = Session.open(overrides)
    if flags.config:
        say(commented(session.composed, overrides), end="")
        return 0
    made = session.plan(online=False)
    console = PlainConsole()
    console.print(plan_table(made))
    if note := session.store.format_note():
        console.print(note, style="yellow", soft_wrap=True)
    running = made.running()
    note = tracking.check(session.settings.logger, online=False)[1]
    if running and note:
        console.print(note, style="yellow", soft_wrap=True)
    if lacking := next((f"{s.name}: {missing}" for s in running if (missing := gpus.lacking(s.stage))), ""):
        console.print(f"Cannot run here: {lacking}.", style="yellow", soft_wrap=True)
    console.print(f"\n{len(running)} of {len(made.steps)} stages would run{_expected(made)}.")
    console.print(f"Store: {session.store.root}", soft_wrap=True)
    return 0


def _expected(made: Plan) -> str:
    """Time and cost of a plan, as the end of a sentence."""
    running = made.running()
    known = [step.seconds for step in running if step.seconds is not None]
    expected = f": {duration(sum(known))}, {money(made.usd())}" if known else ""
    if unknown := len(running) - len(known):
        expected += f", and {unknown} without timings yet" if known else "; no timings yet"
    return expected


def plan_table(plan: Plan, everything: bool = True) -> Table:
    """The plan as a table: action, key, time, cost and reason of each stage. everything: also those that do not run."""
    made = table(["stage", "", "key", "time", "cost", "why"], right=("time", "cost"), fold=("why",))
    for step in plan.steps.values():
        if everything or step.action == "run":
            style = STYLES[step.action]
            name, action = Text(step.name, style), Text(WORDS[step.action], style)
            made.add_row(name, action, step.key or "?", *expected(step), Text(_why(step), "dim"))
    return made


def expected(step: Step) -> tuple[str, str]:
    """Time and cost of a stage that runs; empty for others."""
    if step.action != "run":
        return "", ""
    return "?" if step.seconds is None else duration(step.seconds), "?" if step.usd is None else money(step.usd)


def _why(step: Step) -> str:
    if step.stage.pin:
        return f"pinned to {step.key}"
    if step.key != step.wanted:
        return f"{step.key} was accepted as equal"
    return textwrap.shorten(step.why, WHY_CHARACTERS, placeholder=" ... (see `why`)")


def why(arguments: list[str]) -> int:
    flags = Parser("why", "[STAGE...]", most=None).parse(arguments)
    session = Session.open(flags.overrides)
    session.dag.check_names(flags.names, "why")
    console = PlainConsole()
    for step in session.plan(online=False, targets=flags.names).steps.values():
        if not flags.names or step.name in flags.names:
            _print_why(console, step, content=len(flags.names) == 1)
    return 0


def _print_why(console: Console, step: Step, content: bool) -> None:
    """The key of a stage; what changed if it would run; and, with `content`, what the key is made of."""
    console.print(Text(f"{step.name}  {step.key or 'key unknown until download'}  {step.action}", "bold"))
    for reason in step.why.split("; ") if step.why else ():
        console.print(f"  {reason}", soft_wrap=True)
    if step.key != step.wanted:
        console.print(f"  {step.key} is used instead of {step.wanted}, the key computed from config and code")
    if not content:
        return
    for source, key in (step.content.get("inputs") or {}).items():
        console.print(f"  input {source}: {key}")
    console.print_json(json.dumps({name: step.content.get(name) for name in ("params", "identity")}))
    for module, parts in (step.content.get("code") or {}).items():
        console.print(f"  code {module}: {len(parts)} definitions", style="dim")
    if step.artifact:
        record = step.artifact.record
        resolved = {k: v for k, v in record.get("metrics", {}).items() if k.startswith("resolved_")}
        cost = f"{duration(record['seconds'])} on {record['device']}, {money(record['usd'])}"
        console.print(f"  made in {cost} {resolved or ''}")


def accept(arguments: list[str]) -> int:
    parser = Parser("accept", "STAGE...", least=1, most=None)
    parser.add_argument("--why", metavar="TEXT", required=True, help="the reason, which is kept in the store")
    flags = parser.parse(arguments)
    session = Session.open(flags.overrides)
    session.dag.check_names(flags.names, "accept")
    for name in flags.names:
        step = session.plan(online=False, targets=[name]).steps[name]
        if step.artifact is not None:
            say(f"{name}: nothing to accept, as {step.key} exists")
        elif not step.code_only or step.previous is None or step.wanted is None:
            reason = step.why or "never made"
            raise UserError(f"more than code differs ({reason})", name, "Only a change of code can be accepted.")
        else:
            session.store.memory.accept(step.stage.run, step.wanted, step.previous.key, flags.why)
            say(f"{name}: {step.previous.key} counts as {step.wanted}: {flags.why}")
    return 0
