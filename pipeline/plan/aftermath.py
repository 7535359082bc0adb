"""Consequences of a failed stage for the rest of a run: what cannot be made, what need not be, what still runs."""

from dataclasses import dataclass

from pipeline.plan.plan import Plan


@dataclass(frozen=True)
class Aftermath:
    """Stages of a plan that were to run and have not started, in its order.

    lost: need what failed. unneeded: read only by lost ones, and not asked for. left: the others.
    """

    lost: list[str]
    unneeded: list[str]
    left: list[str]

    def describe(self, running: list[str], wanted: set[str]) -> str:
        """One line for the person who watches; empty where no other stage is concerned."""
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
