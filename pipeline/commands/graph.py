"""`graph`: the stages of a configuration and what each reads, as a tree in the terminal or as a Mermaid flowchart."""

import re

from rich.text import Text
from rich.tree import Tree

from pipeline.artifacts.work import Work
from pipeline.commands.parser import Parser
from pipeline.commands.plan import STYLES, expected
from pipeline.commands.run import usual
from pipeline.numbers import duration
from pipeline.plan.dag import Dag
from pipeline.plan.plan import Plan, Step
from pipeline.plan.session import Session
from pipeline.printing import PlainConsole
from pipeline.runner.launch import read_outcome


def graph(arguments: list[str]) -> int:
    parser = Parser("graph")
    parser.flag("--mermaid", help="print a flowchart for Mermaid, as in Markdown on GitHub")
    flags = parser.parse(arguments)
    session = Session.open(usual(flags))
    plan = session.plan(online=False)
    chosen = Dag({name: step.stage for name, step in plan.steps.items()})
    if flags.mermaid:
        print(mermaid(chosen))
        return 0
    states = {}
    if session.store.artifacts.exists():
        failed = {work.job["key"] for work in Work.all(session.store) if read_outcome(work.folder).status == "failed"}
        states = _states(plan, failed)
    console = PlainConsole()
    for root in tree(chosen, states):
        console.print(root, soft_wrap=False)
    return 0


def _states(plan: Plan, failed: set[str]) -> dict[str, Text]:
    """The state of each stage of a plan, and the time that it took or is expected to take."""

    def state(step: Step) -> Text:
        if step.action == "cached" and step.artifact:
            return Text(f"cached, {duration(step.artifact.record['seconds'])}", STYLES["cached"])
        if step.action != "run":
            return Text("not needed", STYLES["idle"])
        word, style = ("failed, will run again", "red") if step.key in failed else ("will run", STYLES["run"])
        return Text(word if step.seconds is None else f"{word}, {expected(step)[0]}", style)

    return {name: state(step) for name, step in plan.steps.items()}


def edges(dag: Dag) -> dict[str, list[str]]:
    """The inputs of each stage, without those that are also behind another input, whose edges would cross others.

    A pinned stage has none, as its inputs are not looked at.
    """
    found = {}
    for name, stage in dag.stages.items():
        sources = set() if stage.pin else set(stage.inputs.values())
        behind = {far for source in sources for far in dag.behind([source]) - {source}}
        found[name] = sorted(sources - behind)
    return found


def tree(dag: Dag, states: dict[str, Text]) -> list[Tree]:
    """Trees from what is made first to what is made of it. A stage is below the deepest of its inputs; the others are
    named beside it."""
    trees: dict[str, Tree] = {}
    depth: dict[str, int] = {}
    for name, sources in edges(dag).items():
        parent = max(sources, key=lambda source: depth[source], default=None)
        depth[name] = depth[parent] + 1 if parent else 0
        label = Text(name, "bold")
        if name in states:
            label.append("  ").append_text(states[name])
        if others := [source for source in sources if source != parent]:
            label.append(f"  + {', '.join(others)}", "not bold dim")
        trees[name] = trees[parent].add(label) if parent else Tree(label)
    return [trees[name] for name, level in depth.items() if level == 0]


def mermaid(dag: Dag) -> str:
    """The stages as a flowchart, with arrows from each stage to those that read it."""
    nodes = {name: re.sub(r"\W", "_", name) for name in dag.stages}
    readers: dict[str, list[str]] = {name: [] for name in dag.stages}
    for name, sources in edges(dag).items():
        for source in sources:
            readers[source].append(nodes[name])
    named = [f'    {nodes[name]}["{name}"]' for name, near in edges(dag).items() if not near or nodes[name] != name]
    arrows = [f"    {nodes[name]} --> {' & '.join(read_by)}" for name, read_by in readers.items() if read_by]
    return "\n".join(["flowchart LR", *named, *arrows])
