"""Tasks as configuration names them."""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.tasks.task import Task, TaskError


@dataclass
class TaskSpec:
    """One line of a mixture. Raises TaskError when no class fits it."""

    task: str  # import path of the class: data.tasks.arithmetic.Arithmetic
    name: str | None = None  # how results call it; the class's own name if null
    dataset: str | None = None  # the data set it reads, by its name in conf/datasets.yaml
    file: str | None = field(default=None, metadata={"file": True})
    split: str = "train"
    size: int | None = None  # the first so many items after a shuffle; of a generator, how many
    repeat: int = 1  # how often each item is in the mixture
    args: dict[str, Any] = field(default_factory=dict)  # what this task's class takes besides

    def __post_init__(self) -> None:
        if self.file is not None:
            self.file = os.path.expanduser(self.file)
            if os.path.isdir(self.file):
                raise TaskError(f"file {self.file}: is a directory. Name a file in it.")
        task_class(self)

    def check_file(self) -> None:
        """Read all of `file`, so that a malformed line is found before anything is trained. Raises DataError."""
        if self.file is not None and self.dataset is None:
            load_task(self, None)

    @property
    def label(self) -> str:
        return self.name or self.task.rpartition(".")[2]

    @property
    def advisory(self) -> bool:
        return task_class(self).advisory

    @property
    def runs_programs(self) -> bool:
        return task_class(self).runs_programs or self.advisory


@dataclass
class CoreSpec:
    """The CORE bundle: which data set holds it, and how much of it to use."""

    dataset: str = "core"
    max_per_task: int | None = None  # for a quick look; null: all items

    def __post_init__(self) -> None:
        if self.max_per_task is not None and self.max_per_task < 1:
            raise TaskError(f"CORE: max_per_task is {self.max_per_task}; it must be at least 1, or null for all items")


def task_class(spec: TaskSpec) -> type[Task]:
    """The class that the spec names. Raises TaskError when there is none or when the split or `args` do not fit it."""
    module_name, _, class_name = spec.task.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise TaskError(f"task {spec.task!r}: {error}. It must be the import path of a class.") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TaskError(f"task {spec.task!r}: {module_name} has no task of that name")
    known = [name for name in inspect.signature(found).parameters if name not in ("split", "size", "folder", "file")]
    for name in spec.args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes: {', '.join(known) or 'none'}."
            raise TaskError(f"task {spec.label}: there is no argument {name!r}. {hint}")
    if spec.split not in found.splits:
        near = difflib.get_close_matches(spec.split, found.splits, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It has: {', '.join(found.splits)}."
        raise TaskError(f"task {spec.label}: there is no split {spec.split!r}. {hint}")
    if spec.repeat < 1 or (spec.size is not None and spec.size < 1):
        raise TaskError(f"task {spec.label}: size and repeat are numbers from 1 on; leave the task out instead")
    return found


def load_task(spec: TaskSpec, folder: Path | None) -> Task:
    """The task, ready; `folder` holds its data set, if it names one."""
    cls = task_class(spec)
    file = Path(spec.file) if spec.file else None
    task = cls(split=spec.split, size=spec.size, folder=folder, file=file, **spec.args)
    if not len(task):
        raise TaskError(f"task {spec.label}: no items in split {spec.split!r}")
    return task


def load_tasks(specs: Sequence[TaskSpec], inputs: Callable[[str], Path]) -> list[Task]:
    """All tasks of a mixture; `inputs` gives the folder of a data set by its name."""
    return [load_task(spec, inputs(spec.dataset) if spec.dataset else None) for spec in specs]


def usual_tokens(specs: Sequence[TaskSpec]) -> int:
    """About how many tokens a mixture has, before any of its data is here."""
    classes = [task_class(spec) for spec in specs]
    return sum(
        spec.repeat * (spec.size or cls.usual_items) * cls.usual_tokens
        for spec, cls in zip(specs, classes, strict=True)
    )
