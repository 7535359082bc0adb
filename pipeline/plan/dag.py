"""The stages of a run and the edges between them, from config."""

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pipeline import typed
from pipeline.config import renamed
from pipeline.config.compose import Settings, StageConfig
from pipeline.errors import UserError
from pipeline.job import Launch

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

    @property
    def module(self) -> ModuleType:
        return stage_module(self.run, self.name)

    @property
    def has_ranks(self) -> bool:
        return bool(getattr(self.module, "RANKS", False))


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

    def check_names(self, names: list[str], where: str) -> None:
        for name in names:
            if name not in self.stages:
                fix = renamed.did_you_mean(name, self.stages, f"There are: {', '.join(self.stages)}.")
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
                fix = renamed.did_you_mean(source, stages, "Add it to pipeline.stages.")
                raise UserError(
                    f"reads {source}, which is not in pipeline.stages", f"{stage.name}.inputs.{input_name}", fix
                )
    found = Dag(_ordered(stages))
    for stage in found.stages.values():
        _check(stage, found)
    return found


def _check(stage: Stage, found: Dag) -> None:
    """Let the stage's module say what cannot work, as long as nothing has been paid for it."""
    if hook := getattr(stage.module, "check", None):
        with _told_of(f"{stage.name}.params"):
            hook(stage.params, params_behind(stage, found))


def check_launch(stage: Stage, found: Dag) -> None:
    """The same of how the stage is to be run, which concerns only a stage that runs. Raises UserError."""
    if hook := getattr(stage.module, "check_launch", None):
        with _told_of(stage.name):
            hook(stage.params, stage.launch, params_behind(stage, found))


def check_files(stages: list[Stage]) -> None:
    """Read the user's files that stages to run will read, each once. Raises UserError for a malformed line.

    It is then found before anything is made.
    """
    checked: list[Any] = []
    for stage in stages:
        for part in parts_of(stage.params):
            if hasattr(part, "check_file") and part not in checked:
                with _told_of(f"{stage.name}.params"):
                    part.check_file()
                checked.append(part)


def params_behind(stage: Stage, found: Dag) -> dict[str, Any]:
    """What a module's hooks are told: params of all stages behind this one, by stage name, and of what it reads itself
    by input name as well."""
    behind = {name: found.stages[name].params for name in found.behind([stage.name]) - {stage.name}}
    return behind | {name: found.stages[source].params for name, source in stage.inputs.items()}


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """What a module says is wrong becomes a UserError."""
    try:
        yield
    except Exception as error:
        if getattr(error, "cause", None) != "config":
            raise
        raise UserError(str(error), where) from None


def stage_module(run: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in run.split(".")):
        raise UserError(f"is {run!r}, which is no module", f"{name}.run", "Name one, as pipeline.stages.pretrain.")
    try:
        module = importlib.import_module(run)
    except ModuleNotFoundError as error:
        if error.name and not run.startswith(error.name):
            raise
        raise UserError(f"names {run}, which cannot be imported", f"{name}.run") from None
    if not hasattr(module, "Params") or not hasattr(module, "main"):
        raise UserError(f"names {run}, which has no Params or no main", f"{name}.run")
    return module


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
    module = stage_module(declared.run, name)
    params = typed.build(module.Params, declared.params, f"{name}.params")
    own = typed.build(Launch, dataclasses.asdict(launch) | declared.launch, f"{name}.launch")
    inputs = {name: source for name, source in declared.inputs.items() if source is not None}
    return Stage(name, declared.run, inputs, params, own, declared.pin)


def _dataset(dataset: str, reader: str, settings: Settings) -> StageConfig:
    if dataset not in settings.datasets:
        fix = renamed.did_you_mean(dataset, settings.datasets, f"There are: {', '.join(settings.datasets)}.")
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
