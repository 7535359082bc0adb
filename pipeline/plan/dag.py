"""The stages of a run and the edges between them, from config."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data.errors import did_you_mean
from pipeline import typed
from pipeline.config import renamed
from pipeline.config.settings import Settings, StageConfig
from pipeline.errors import FOR_USERS, UserError
from pipeline.job import Launch
from pipeline.stage import Inputs, StageModule, Upstream, load

DATASET = "dataset/"


@dataclass(frozen=True)
class Stage:
    """A declared stage with its parameters typed by its module."""

    name: str
    run: str
    inputs: dict[str, str]  # input name -> name of the stage that makes it
    params: Any
    launch: Launch
    pin: str | None = None

    @cached_property
    def module(self) -> StageModule:
        return load(self.run, self.name)


@dataclass(frozen=True)
class Dag:
    stages: dict[str, Stage]  # makers before readers

    def targets(self) -> list[str]:
        """Stages that nothing reads."""
        read = {name for stage in self.stages.values() for name in stage.inputs.values()}
        return [name for name in self.stages if name not in read]

    def behind(self, names: list[str]) -> set[str]:
        """`names` and all they need, not looking behind a pinned stage."""
        seen: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                if self.stages[name].pin is None:
                    waiting += self.stages[name].inputs.values()
        return seen

    def upstream(self, stage: Stage) -> Inputs:
        """The inputs of a stage as hooks of its module get them."""
        read = {name: self.stages[source] for name, source in stage.inputs.items()}
        return {name: Upstream(s.params, {} if s.pin is not None else self.upstream(s)) for name, s in read.items()}

    def check_names(self, names: list[str], where: str) -> None:
        for name in names:
            if name not in self.stages:
                fix = did_you_mean(name, self.stages, f"There are: {', '.join(self.stages)}.")
                raise UserError(f"there is no stage {name!r}", where, renamed.hint(name) or fix)


def build(settings: Settings) -> Dag:
    """The DAG that the settings declare. Raises UserError for unknown inputs, cycles and wrong parameters."""
    stages: dict[str, Stage] = {}
    for name, declared in settings.stages.items():
        stage = _typed(name, declared, settings.launch)
        for dataset in dict.fromkeys(datasets_in(stage.params)):
            source = DATASET + dataset
            if source not in stages:
                stages[source] = _typed(source, _dataset(dataset, name, settings), settings.launch)
            stage.inputs[source] = source
        stages[name] = stage
    for stage in stages.values():
        for input_name, source in stage.inputs.items():
            if source not in stages:
                fix = did_you_mean(source, stages, "Add it to pipeline.stages.")
                raise UserError(
                    f"reads {source}, which is not in pipeline.stages", f"{stage.name}.inputs.{input_name}", fix
                )
    found = Dag(_ordered(stages))
    for stage in found.stages.values():
        with _mistakes_at(f"{stage.name}.params"):
            stage.module.check(stage.params, found.upstream(stage))
    return found


def check_launch(stage: Stage, found: Dag) -> None:
    """Raise UserError for a stage that cannot be run as its `launch` says."""
    with _mistakes_at(stage.name):
        stage.module.check_launch(stage.params, stage.launch, found.upstream(stage))


def check_files(stages: list[Stage]) -> None:
    """Read the user's files that stages to run will read, each once. Raises UserError for a malformed line.

    It is then found before anything is made.
    """
    checked: list[Any] = []
    for stage in stages:
        for part in parts_of(stage.params):
            if hasattr(part, "check_file") and part not in checked:
                with _mistakes_at(f"{stage.name}.params"):
                    part.check_file()
                checked.append(part)


@contextmanager
def _mistakes_at(where: str) -> Iterator[None]:
    """A module's error of cause config becomes a UserError that names the setting."""
    try:
        yield
    except FOR_USERS as error:
        if error.cause != "config":
            raise
        raise UserError(str(error), where) from None


def datasets_in(params: Any) -> Iterator[str]:
    """Names of data sets that a parameter tree asks for: the values of fields called `dataset`."""
    for part in parts_of(params):
        if isinstance(dataset := getattr(part, "dataset", None), str):
            yield dataset


def parts_of(params: Any) -> Iterator[Any]:
    """The dataclass instances in a parameter tree, it included."""
    if dataclasses.is_dataclass(params):
        yield params
        params = vars(params)
    if isinstance(params, dict):
        params = list(params.values())
    if isinstance(params, (list, tuple)):
        for item in params:
            yield from parts_of(item)


def _typed(name: str, declared: StageConfig, launch: Launch) -> Stage:
    params = typed.build(load(declared.run, name).Params, declared.params, f"{name}.params")
    own = typed.build(Launch, dataclasses.asdict(launch) | declared.launch, f"{name}.launch")
    inputs = {name: source for name, source in declared.inputs.items() if source is not None}
    return Stage(name, declared.run, inputs, params, own, declared.pin)


def _dataset(dataset: str, reader: str, settings: Settings) -> StageConfig:
    if dataset not in settings.datasets:
        fix = did_you_mean(dataset, settings.datasets, f"There are: {', '.join(settings.datasets)}.")
        raise UserError(f"asks for the data set {dataset!r}, which is not declared", reader, fix)
    return StageConfig(run="pipeline.stages.download", params=settings.datasets[dataset])


def _ordered(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Makers before readers, else in the declared order."""
    done: dict[str, Stage] = {}
    visiting: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in visiting:
            raise UserError(f"form a circle: {' -> '.join([*visiting[visiting.index(name) :], name])}", "stage inputs")
        visiting.append(name)
        for source in stages[name].inputs.values():
            visit(source)
        visiting.pop()
        done[name] = stages[name]

    for name in stages:
        visit(name)
    return done
