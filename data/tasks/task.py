"""Base classes of tasks, and what tasks are made from: random draws that can be repeated, tables, words.

A task is a list of conversations to learn from, and a way to tell whether an answer is right.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from data.chat.conversation import Conversation
from data.errors import DataError, DataMistake
from data.text.files import whole_all
from data.text.parquet import open_parquet, read_batches

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
BATCH = 1 << 14  # rows of a table that are decoded at a time


class TaskError(DataMistake):
    """A mixture names a task, or a setting of it, wrongly."""


@dataclass(frozen=True)
class Check:
    """A test of a function that a program defines: the task's own source, which defines check(candidate).

    It runs apart from the program: `candidate` calls `function` in another process, with arguments and results that
    are copies of plain values (numbers, texts, lists, dicts, ...), and raises what that raises.
    """

    source: str
    function: str


class Execute(Protocol):
    """Runs a program; the result is true if the program, and the check if there is one, end without an exception.

    Without a check the program reports its own verdict, which it can forge: see Task.advisory.
    """

    def __call__(self, program: str, check: Check | None = None) -> object: ...


@dataclass(eq=False)
class Task:
    """Base of the tasks in data/tasks; a new one is one file with one class and one line of a mixture.

    Every task takes the settings below and may declare more, which the line's `args` name.

    split: one of `splits`, which a class whose data set has other parts sets for itself.
    size: the number of items to use; None: all of them.
    folder: the files of the data set that the line names, in their repository's layout.
    file: the one file that the line names.
    """

    kind: ClassVar[Literal["generate", "choice"]] = "generate"
    baseline: ClassVar[float] = 0.0  # accuracy of guessing
    usual_items: ClassVar[int] = 1000  # what a plan expects of a line without a size
    usual_tokens: ClassVar[int] = 100  # and of a conversation, with a vocabulary of tens of thousands
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    runs_programs: ClassVar[bool] = False  # grades by running what the model wrote
    advisory: ClassVar[bool] = False  # runs it without a Check; rl does not learn from it

    split: str = "train"
    size: int | None = None
    folder: Path | None = None
    file: Path | None = None
    notes: dict[str, int] = field(default_factory=dict, init=False)  # what the reader of a file ignored or replaced

    def __post_init__(self) -> None:
        """Prepare the items; a subclass with settings of its own is a dataclass, too, and does so here."""

    def table(self, pattern: str, columns: list[str]) -> "Table":
        """The data set's rows, for a task whose items are these: it sets `rows` to them."""
        return Table(self.folder, pattern.format(split=self.split), columns, self.size)

    def __len__(self) -> int:
        if (rows := getattr(self, "rows", None)) is None:
            raise TaskError(f"{type(self).__name__} does not say how many items it has")
        return len(rows)

    def conversation(self, i: int) -> Conversation:
        """Item i with the right answer as its last message."""
        raise TaskError(f"{type(self).__name__} has no conversations")

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        """1.0 if `completion` answers item i, else 0.0; a number in between where a task accepts partial answers."""
        raise TaskError(f"{type(self).__name__} cannot be graded: use it in a mixture to train on, not to evaluate")

    def letters(self, i: int) -> list[str]:
        """The letters that item i of a `choice` task offers."""
        raise TaskError(f"{type(self).__name__} is not a multiple choice task")

    def answer(self, i: int) -> str:
        """The right letter of item i of a `choice` task."""
        raise TaskError(f"{type(self).__name__} is not a multiple choice task")


class ChoiceTask(Task):
    """A question with lettered choices, asked in one form and answered by the bare letter."""

    kind = "choice"
    baseline = 0.25

    def question(self, i: int) -> tuple[str, list[str], list[str], str]:
        """(question, choices, their letters, the right letter) of item i."""
        raise TaskError(f"{type(self).__name__} has no questions")

    def conversation(self, i: int) -> Conversation:
        question, choices, letters, right = self.question(i)
        # The letter comes last and without a space: it is then the very token that is scored as the answer.
        lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
        prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
        return dialogue(prompt, right)

    def letters(self, i: int) -> list[str]:
        return self.question(i)[2]

    def answer(self, i: int) -> str:
        return self.question(i)[3]

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        return float(completion.strip() == self.answer(i))


def dialogue(*turns: str | list[dict[str, str]]) -> Conversation:
    """A conversation of the given turns, the user's first."""
    return {"messages": [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]}


# --- random draws: the same on every machine, and never the same in training and evaluation


def keyed(text: str) -> int:
    """64 bits that depend on `text` alone; stable across Python versions and processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(problem: str, fraction: float = 0.1) -> bool:
    """Return True if a problem is for evaluation only.

    This depends on the problem itself, not on who draws it: training and evaluation share none, whatever their seeds
    and sizes.
    """
    return keyed(f"held out: {problem}") < fraction * 2**64


class Draw:
    """Random choices named by a text. Uses `random.random` alone, whose sequence Python promises not to change."""

    def __init__(self, name: str):
        self._random = random.Random(keyed(name)).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """One of the options, with probabilities in proportion to their weights."""
        point = self._random() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            point -= weight
            if point < 0:
                return option
        return options[-1]

    def order(self, n: int) -> list[int]:
        """range(n), shuffled."""
        keys = [self._random() for _ in range(n)]
        return sorted(range(n), key=keys.__getitem__)


# --- tables


class Table:
    """The rows of the files in `folder` that match `pattern`: the first `size` after a shuffle that is always the same.

    Columns stay in Arrow's memory (about the size of the text); a row becomes Python objects when it is asked for.
    Raises DataError for files that are missing, damaged, or lack one of `columns`.
    """

    def __init__(self, folder: Path | None, pattern: str, columns: list[str], size: int | None):
        import pyarrow

        if folder is None:
            raise TaskError(f"this task reads {pattern} of a data set: name it in the mixture as `dataset: NAME`")
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise DataError(f"{folder}: there is no {pattern}; add it to the data set's files in conf/datasets")
        tables = [_read(path, columns) for path in paths]
        self._table = pyarrow.concat_tables(tables, promote_options="permissive")
        self._where = folder / pattern
        self._order = Draw(pattern.partition("*")[0]).order(self._table.num_rows)[:size]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._table.slice(self._order[i], 1)
        try:
            return row.to_pylist()[0]
        except UnicodeDecodeError:
            pass
        try:
            return {name: whole_all(_as_binary(row[name])) for name in row.column_names}
        except UnicodeDecodeError:
            raise DataError(f"{self._where}: row {self._order[i] + 1} contains text that is not UTF-8.") from None


def _as_binary(column: "pyarrow.ChunkedArray") -> Any:
    """The only value of a column, with its texts still encoded."""
    import pyarrow

    def binary(of: "pyarrow.DataType") -> "pyarrow.DataType":
        if pyarrow.types.is_string(of):
            return pyarrow.binary()
        if pyarrow.types.is_large_string(of):
            return pyarrow.large_binary()
        if pyarrow.types.is_struct(of):
            return pyarrow.struct([of.field(i).with_type(binary(of.field(i).type)) for i in range(of.num_fields)])
        if pyarrow.types.is_list(of):
            return pyarrow.list_(of.value_field.with_type(binary(of.value_type)))
        return of

    (chunk,) = column.chunks
    return chunk.view(binary(chunk.type)).to_pylist()[0]


def _read(path: Path, columns: list[str]) -> "pyarrow.Table":
    import pyarrow

    file = open_parquet(path)
    if missing := set(columns) - set(file.schema_arrow.names):
        raise DataError(f"{path}: there is no column {', '.join(sorted(missing))}")
    schema = pyarrow.schema([file.schema_arrow.field(column) for column in columns])
    return pyarrow.Table.from_batches((batch.select(columns) for batch in read_batches(path, columns, BATCH)), schema)


# --- words


def split_words(split: str, folder: Path | None, shortest: int, longest: int) -> list[str]:
    """The words of one split, sorted; what is held out for "test" is in no other split, in every task that spells.

    folder: contains the word list (a .txt file with one word per line). Raises TaskError without one, DataError when no
    word is left.
    """
    if folder is None:
        raise TaskError("spelling needs words: name a data set with a word list, as in dataset: python_words")
    paths = [path for path in sorted(folder.glob("**/*.txt")) if path.name != "log.txt"]  # the log of the download
    if len(paths) != 1:
        raise DataError(f"{folder}: a word list is one .txt file, but there are {len(paths)}")
    words = paths[0].read_text(encoding="utf-8", errors="replace").split()
    kept = sorted({word for word in words if word.isascii() and word.islower() and shortest <= len(word) <= longest})
    chosen = [word for word in kept if held_out(f"word {word}") == (split == "test")]
    if not chosen:
        raise DataError(f"{folder}: no words of {shortest} to {longest} letters for {split}")
    return chosen
