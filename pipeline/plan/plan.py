"""The plan of a run: which stages it makes, why, and at what cost; and which of them still run after a failure."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.artifacts.store import RECORD, Artifact, Store
from pipeline.errors import Corrupt, Guarded, UserError
from pipeline.plan import keys
from pipeline.plan.code import code_of
from pipeline.plan.dag import Dag, Stage, check_files, check_launch

Action = Literal["cached", "run", "idle"]


@dataclass
class Step:
    """One stage in a plan.

    key: None while the data behind it is unknown. wanted: the key that settings and code give; `key` differs from it
    when an older artifact was accepted as equal, or pinned. content: what the key is computed from. data_identity: the
    result of the module's hook (pipeline/stage.py). action: "cached" (used or kept as it is), "run", or "idle"
    (missing, but nothing that runs reads it). seconds and usd: expected; None if unknown.
    """

    stage: Stage
    key: str | None = None
    wanted: str | None = None
    content: dict[str, Any] = field(default_factory=dict)
    data_identity: dict[str, Any] | None = None
    artifact: Artifact | None = None
    action: Action = "cached"
    why: str = ""
    code_only: bool = False
    previous: Artifact | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def usd(self) -> float | None:
        return None if self.seconds is None else self.seconds / 3600 * self.stage.launch.usd_per_hour


@dataclass
class Plan:
    steps: dict[str, Step]  # makers before readers
    targets: list[str]

    def running(self) -> list[Step]:
        return [step for step in self.steps.values() if step.action == "run"]

    def usd(self) -> float:
        return sum(step.usd or 0.0 for step in self.running())


def make_plan(
    dag: Dag,
    store: Store,
    online: bool,
    hub: dict[str, Any] | None = None,
    until: str | None = None,
    only: list[str] | None = None,
    force: list[str] | None = None,
    targets: list[str] | None = None,
    recipe: str = "",
) -> Plan:
    """Compare what the config asks for with what the store holds.

    online: whether data that was never seen may be looked up over the network; otherwise nothing is written, either.
    hub: the endpoint to ask, and those that get the user's token, which the download stage's `data_identity` finds in
    its memory. Raises UserError for unknown stages, for `only` when an input of a chosen stage is missing, and for
    processes or rows that a stage which runs cannot use.
    """
    if until and only:
        raise UserError("cannot be combined", "until, only", "only=[...] alone names the stages to make.")
    chosen = ([until] if until else None) or only or targets or dag.targets()
    dag.check_names(chosen, "until" if until else "only" if only else "stages")
    dag.check_names(force or [], "force")
    inner = dag.behind(chosen)
    _check_force(dag, inner, set(only or inner), force or [])
    steps: dict[str, Step] = {}
    for name, stage in dag.stages.items():
        if name in inner:
            steps[name] = _look(stage, steps, store, online, hub or {}, name in (force or []))
    _decide(steps, set(chosen), set(only or []), set(force or []))
    newest = _newest_by_stage(store) if any(step.action != "cached" for step in steps.values()) else {}
    for step in steps.values():
        if step.action != "cached":
            _explain(step, steps, newest.get(step.name, []), step.name in (force or []))
            step.seconds = _estimate(step, dag, recipe)
        if step.action == "run":
            check_launch(step.stage, dag)
    check_files([step.stage for step in steps.values() if step.action == "run"])
    return Plan(steps, chosen)


def _check_force(dag: Dag, inner: set[str], made: set[str], force: list[str]) -> None:
    """Raises UserError for stages in `force` that the run would not make."""
    for name in force:
        if dag.stages[name].pin is not None:
            raise UserError(f"{name} is pinned and cannot be made", "force", f"Drop {name}.pin, or {name} here.")
        if name not in inner & made:
            raise UserError(f"this run does not make {name}", "force", "Drop it here, or choose other stages.")


def _look(stage: Stage, steps: dict[str, Step], store: Store, online: bool, hub: dict[str, Any], force: bool) -> Step:
    """Find the key of a stage and its artifact in the store. force: make it again, and look its data up again."""
    step = Step(stage)
    if stage.pin is not None:
        found = store.find_by_name(stage.pin)
        if not store.folder(stage.run, found.key).exists():
            raise UserError(f"is a {found.module}, not what {stage.run} makes", f"{stage.name}.pin={stage.pin}")
        step.key = step.wanted = found.key
    else:
        sources = {name: steps[source].key for name, source in stage.inputs.items()}
        memory = store.memory if online else store.memory.unwritten()
        data: dict[str, Any] | None = {"files": None}
        if hook := stage.module.data_identity:
            data = memory.data_identity(lambda known: hook(stage.params, known, online), hub, fresh=force and online)
        if data is None or None in sources.values():
            step.why = "unknown until download"
            step.content = {"identity": None}
            return step
        step.data_identity, files = data, data["files"]
        params = keys.canonical(stage.params, memory.file_digest, f"{stage.name}.params")
        code = code_of(stage.run, params)
        step.content = {"params": params, "inputs": sources, "identity": files, "code": code.parts}
        step.wanted = keys.stage_key(stage.run, params, sources, files, code.digest)  # type: ignore[arg-type]
        # An artifact of this very code comes before one that was accepted as equal.
        own = force or (store.folder(stage.run, step.wanted) / RECORD).exists()
        step.key = step.wanted if own else memory.accepted(stage.run, step.wanted)
    try:
        step.artifact = store.find(stage.run, step.key)
    except Corrupt as error:
        if stage.pin is not None:
            raise UserError(f"is damaged: {error}", f"{stage.name}.pin={stage.pin}", "Pin another, or none.") from None
        step.why = f"damaged: {error}"
    if step.artifact is None and step.key != step.wanted and stage.pin is None:
        step.key = step.wanted  # the accepted artifact is gone
    return step


def _decide(steps: dict[str, Step], targets: set[str], only: set[str], force: set[str]) -> None:
    """A stage runs if its artifact is missing and it is a target or something that runs reads it."""
    read: set[str] = set()
    for name in reversed(list(steps)):
        step = steps[name]
        wanted = name in targets or name in read
        if (step.artifact is not None and name not in force) or step.stage.pin is not None:
            continue
        if name in force and (not only or name in only):
            step.action = "run"
        else:
            step.action = "run" if wanted else "idle"
        if step.action == "run":
            if only and name not in only:
                reader = next(s.name for s in steps.values() if name in s.stage.inputs.values() and s.action == "run")
                raise UserError(
                    f"{reader} needs {name}, which is not in the store", "only", f"Add {name} to only, or drop it."
                )
            read |= set(step.stage.inputs.values())


def _newest_by_stage(store: Store) -> dict[str, list[Artifact]]:
    found: dict[str, list[Artifact]] = {}
    for artifact in store.all():
        for name in artifact.stages:
            found.setdefault(name, []).append(artifact)
    return found


def _explain(step: Step, steps: dict[str, Step], earlier: list[Artifact], forced: bool) -> None:
    """Why the artifact is not there: what differs from the nearest one this stage has made."""
    earlier = [a for a in earlier if a.record.get("code") is not None]
    if not step.content.get("code"):
        step.previous = earlier[0] if earlier else None
        return
    same = [a for a in earlier if all(a.record.get(k) == step.content[k] for k in ("params", "inputs", "identity"))]
    step.previous = next(iter(same or earlier), None)
    if step.why:
        return
    if forced and step.artifact:
        step.why = "forced"
    elif step.previous is None:
        step.why = "never made"
    elif step.previous.key == step.key:
        step.why = "was removed"
    else:
        step.code_only = bool(same)
        remade = [s for s in step.stage.inputs.values() if steps[s].action == "run"]
        lines = [
            line
            for line in keys.differences(step.previous.record, step.content)
            if not (remade and line.startswith("input ") and step.stage.inputs.get(line.split()[1]) in remade)
        ]
        if remade:
            lines.append(f"{', '.join(remade)} {'is' if len(remade) == 1 else 'are'} made again")
        step.why = "; ".join(lines)


def _estimate(step: Step, dag: Dag, recipe: str) -> float | None:
    """Expected seconds: by the module's own formula, else what the same stage of the same recipe took last time."""
    stage = step.stage
    if (seconds := stage.module.estimate(stage.params, stage.launch, dag.upstream(stage))) is not None:
        return float(seconds)
    if step.previous and step.previous.record.get("recipe", "") == recipe:
        return float(step.previous.record["seconds"])
    return None


def check_guards(plan: Plan, usd: float | None, budget_usd: float | None, force: list[str]) -> None:
    """Raise Guarded when code alone would make paid work again, or the run costs more than its budget."""
    blamed = [step for step in plan.running() if step.code_only and step.name not in force]
    if usd is not None and blamed:
        lost = sum(_paid(step) for step in plan.running() if step.previous)
        if lost > usd:
            lines = [f"{step.name}: {step.why} (cost ${_paid(step):.2f} last time)" for step in blamed]
            names = " ".join(step.name for step in blamed)
            raise Guarded(
                f"only code changed, and making it all again costs about ${lost:.2f} (guard.usd={usd:g}):\n  "
                + "\n  ".join(lines)
                + f"\nIf results are the same: python flows.py accept {names} --why TEXT"
                + f"\nIf not: add 'force=[{','.join(step.name for step in blamed)}]'"
            )
    if budget_usd is not None and plan.usd() > budget_usd:
        raise Guarded(f"this run is expected to cost ${plan.usd():.2f}, more than guard.budget_usd={budget_usd:g}")


def _paid(step: Step) -> float:
    """What making the step again costs: at today's price or as last time, whichever is more."""
    if step.previous is None:
        return 0.0
    today = float(step.previous.record["seconds"]) / 3600 * step.stage.launch.usd_per_hour
    return max(today, float(step.previous.record.get("usd") or 0.0))


# --- after a failure


@dataclass(frozen=True)
class Aftermath:
    """Stages of a plan that were to run and have not started, in its order.

    lost: need what failed. unneeded: read only by lost ones, and not asked for. left: the others.
    """

    lost: list[str]
    unneeded: list[str]
    left: list[str]

    def describe(self, running: list[str], wanted: set[str]) -> str:
        """One line for the user; empty if no other stage is affected."""
        parts = []
        if self.lost:
            parts.append(f"Cannot be made without it: {', '.join(self.lost)}.")
        if self.unneeded:
            parts.append(f"Not started, because only those need them: {', '.join(self.unneeded)}.")
        still = [f"{name} (running)" for name in running]
        still += [f"{name} ({'asked for' if name in wanted else 'needed by one asked for'})" for name in self.left]
        if parts and still:
            parts.append(f"The run continues with: {', '.join(still)}.")
        return " ".join(parts)


def wanted_by_name(plan: Plan, force: list[str]) -> set[str]:
    """Stages that were asked for, whether others need them or not."""
    return {*plan.targets, *force}


def after(plan: Plan, failed: set[str], started: set[str], wanted: set[str]) -> Aftermath:
    """started: stages that run or have ended, the failed ones included; they are left to end."""
    running = {step.name: set(step.stage.inputs.values()) for step in plan.running()}
    lost: set[str] = set()
    for name, sources in running.items():  # makers before readers
        if sources & (failed | lost):
            lost.add(name)
    needed: set[str] = set()
    for name in reversed(running):
        readers = {reader for reader, sources in running.items() if name in sources}
        if name not in lost | failed and (name in wanted or readers & needed):
            needed.add(name)
    waiting = [name for name in running if name not in started]
    return Aftermath(
        lost=[name for name in waiting if name in lost],
        unneeded=[name for name in waiting if name not in lost | needed],
        left=[name for name in waiting if name in needed],
    )
