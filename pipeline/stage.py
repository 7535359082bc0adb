"""A stage's module: what it must offer, what planning may ask it, and what holds where it does not answer."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.errors import UserError
from pipeline.job import Job, Launch

P = TypeVar("P")


@dataclass(frozen=True)
class Upstream:
    """A stage that another one reads: its parameters, and what it reads itself (nothing where it is pinned)."""

    params: Any
    inputs: "Inputs"


Inputs = Mapping[str, Upstream]  # by the input's name in conf/stage


def params_of(inputs: Inputs, path: str, kind: type[P]) -> P | None:
    """Parameters of the stage behind an input, or behind an input of that: "tokens.shards".

    None if there is no such input, or a stage of another kind makes it, for example one of the user's own.
    """
    found = None
    for name in path.split("."):
        found = inputs.get(name)
        if found is None:
            return None
        inputs = found.inputs
    return found.params if found and isinstance(found.params, kind) else None


class StageModule(Protocol):
    """What `run:` in conf/stage names. A module needs `Params` and `main`; the rest it may leave out.

    All but `main` is used while planning, which takes a second or two: import torch and the like within functions only.
    Errors of `check` and `check_launch` should be DataMistake, ModelError or UserError, whose texts users read.
    """

    Params: type[Any]  # a dataclass: WHAT is made, which enters the key
    main: Callable[[Job[Any]], dict[str, Any] | None]  # makes it in job.out; returns the artifact's metrics
    RANKS: bool = False  # True: runs under torchrun, as launch.nproc processes
    SCORES: bool = False  # True: what main returns are measurements, which trackers show although it logs no steps
    # (params, memory, online) -> the data that the stage stands for besides its inputs, {"files": enters the key,
    # "source": does not}; None if finding out takes the network and online is False. memory: what is known already.
    data_identity: Callable[[Any, dict[str, Any], bool], dict[str, Any] | None] | None = None

    def check(self, params: Any, inputs: Inputs) -> None:
        """Raise an error for parameters that cannot work, before anything is paid for."""
        return None

    def check_launch(self, params: Any, launch: Launch, inputs: Inputs) -> None:
        """Raise an error for settings of `launch` that cannot work; asked only of stages that will run."""
        return None

    def estimate(self, params: Any, launch: Launch, inputs: Inputs) -> float | None:
        """Expected seconds before the stage has ever run; None if unknown."""
        return None


OPTIONAL = ("RANKS", "SCORES", "check", "check_launch", "data_identity", "estimate")


class _Loaded(StageModule):
    def __init__(self, module: Any) -> None:
        self.Params, self.main = module.Params, module.main
        vars(self).update({name: getattr(module, name) for name in OPTIONAL if hasattr(module, name)})


def load(run: str, stage: str) -> StageModule:
    """A stage's module, with defaults for what it leaves out. Raises UserError for a module that is not a stage."""
    if not all(part.isidentifier() for part in run.split(".")):
        raise UserError(
            f"is {run!r}, which is not a module", f"{stage}.run", "Name one, such as pipeline.stages.pretrain."
        )
    try:
        module = importlib.import_module(run)
    except ModuleNotFoundError as error:
        if error.name and not run.startswith(error.name):
            raise
        raise UserError(f"names {run}, which cannot be imported", f"{stage}.run") from None
    if not hasattr(module, "Params") or not hasattr(module, "main"):
        raise UserError(f"names {run}, which has no Params or no main", f"{stage}.run")
    return _Loaded(module)
