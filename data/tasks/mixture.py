"""Mixtures of tasks: their lines in configuration, and many tasks as one list of conversations."""

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.chat.conversation import Conversation
from data.errors import did_you_mean
from data.tasks.task import Draw, Task, TaskError


@dataclass
class TaskSpec:
    """One line of a mixture. Raises TaskError when no class fits it."""

    task: str  # import path of the class: data.tasks.arithmetic.Arithmetic
    name: str | None = None  # in results; null: the class's own name
    dataset: str | None = None  # the data set it reads, by its name in conf/datasets
    file: str | None = field(default=None, metadata={"file": True})
    split: str = "train"
    size: int | None = None  # the first items after a shuffle; of a generator, their number
    repeat: int = 1  # occurrences of each item in the mixture
    args: dict[str, Any] = field(default_factory=dict)  # further settings that this task's class declares

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
    """The CORE bundle: the data set that contains it, and the part of it to use."""

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
            hint = did_you_mean(name, known, f"It takes: {', '.join(known) or 'none'}.")
            raise TaskError(f"task {spec.label}: there is no argument {name!r}. {hint}")
    if spec.split not in found.splits:
        hint = did_you_mean(spec.split, found.splits, f"It has: {', '.join(found.splits)}.")
        raise TaskError(f"task {spec.label}: there is no split {spec.split!r}. {hint}")
    if spec.repeat < 1 or (spec.size is not None and spec.size < 1):
        raise TaskError(f"task {spec.label}: size and repeat must be at least 1; leave the task out instead")
    return found


def load_task(spec: TaskSpec, folder: Path | None) -> Task:
    """The task, ready for use; `folder` contains its data set, if it names one."""
    file = Path(spec.file) if spec.file else None
    task = task_class(spec)(split=spec.split, size=spec.size, folder=folder, file=file, **spec.args)
    if not len(task):
        raise TaskError(f"task {spec.label}: no items in split {spec.split!r}")
    return task


def load_tasks(specs: Sequence[TaskSpec], inputs: Callable[[str], Path]) -> list[Task]:
    """All tasks of a mixture; `inputs` returns the folder of a data set by its name."""
    return [load_task(spec, inputs(spec.dataset) if spec.dataset else None) for spec in specs]


def usual_tokens(specs: Sequence[TaskSpec]) -> int:
    """Approximate number of tokens of a mixture, before any of its data is here."""
    classes = [task_class(spec) for spec in specs]
    return sum(s.repeat * (s.size or cls.usual_items) * cls.usual_tokens for s, cls in zip(specs, classes, strict=True))


class TaskSequence:
    """Tasks one after the other, each in its own order; a task is repeated as a whole."""

    def __init__(self, tasks: Sequence[Task], repeats: Sequence[int]):
        self.tasks = tasks
        counts = [(number, repeat, len(task)) for number, (task, repeat) in enumerate(zip(tasks, repeats, strict=True))]
        self.items = [(number, i) for number, repeat, count in counts for _ in range(repeat) for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Conversation:
        task, item = self.items[i]
        return self.tasks[task].conversation(item)


class TaskMixture(TaskSequence):
    """All items of all tasks, each as often as its task is repeated, shuffled; the same for the same seed."""

    def __init__(self, tasks: Sequence[Task], repeats: Sequence[int], seed: int = 0):
        super().__init__(tasks, repeats)
        self.items = [self.items[i] for i in Draw(f"mixture {seed}").order(len(self.items))]
