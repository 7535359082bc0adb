"""Tasks that are graded by running what a model wrote: whether this machine may run it, and what is left out."""

from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError
from pipeline.job import Job

if TYPE_CHECKING:
    from data.tasks.mixture import TaskSpec
    from evals.sandbox.box import Sandbox

Programs = Literal["run", "skip"]


def without_programs(specs: "list[TaskSpec]", programs: Programs) -> "tuple[list[TaskSpec], list[str]]":
    """The tasks to use, and the names of those that `programs` leaves out."""
    left_out = [spec for spec in specs if programs == "skip" and spec.runs_programs]
    return [spec for spec in specs if spec not in left_out], [spec.label for spec in left_out]


def open_sandbox(job: Job[Any], specs: "list[TaskSpec]") -> "Sandbox":
    """The sandbox for the programs of these tasks.

    Raises UserError where launch.sandbox=strict would refuse to run them, before anything else is done.
    """
    from evals.sandbox.box import Sandbox

    sandbox = Sandbox(mode=job.launch.sandbox)
    names = ", ".join(spec.label for spec in specs if spec.runs_programs)
    if names and sandbox.mode == "strict" and sandbox.weakness:
        raise UserError(
            f"programs written by the model for {names} cannot be confined: {sandbox.weakness}",
            job.stage,
            f"Set launch.sandbox=weak to run them anyway, or {job.stage}.params.programs=skip to leave {names} out.",
        )
    return sandbox
