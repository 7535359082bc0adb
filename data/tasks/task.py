"""What a task is: conversations to learn from, and a way to tell whether an answer is right."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from data.chat.conversation import Conversation
from data.errors import DataMistake


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


class TaskError(DataMistake):
    """A mixture names a task, or a setting of it, wrongly."""


class Task:
    """Base of the tasks in data/tasks; a new one is one file with one class and one line of a mixture.

    Every task takes the keywords below and may take some of its own, which the line's `args` name.

    split: one of `splits`, which a class whose data set has other parts sets for itself.
    size: use so many of the items; None is all of them.
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

    def __init__(
        self, split: str = "train", size: int | None = None, folder: Path | None = None, file: Path | None = None
    ):
        self.split, self.size, self.folder, self.file = split, size, folder, file
        self.notes: dict[str, int] = {}  # what the reader of a file ignored or replaced, and how often

    def __len__(self) -> int:
        raise TaskError(f"{type(self).__name__} does not say how many items it has")

    def conversation(self, i: int) -> Conversation:
        """Item i with the right answer as its last message."""
        raise TaskError(f"{type(self).__name__} has no conversations")

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        """1.0 if `completion` answers item i, else 0.0; something between where a task knows of half answers."""
        raise TaskError(f"{type(self).__name__} cannot be graded: use it in a mixture to train on, not to evaluate")

    def letters(self, i: int) -> list[str]:
        """The letters that item i of a `choice` task offers."""
        raise TaskError(f"{type(self).__name__} is no multiple choice task")

    def answer(self, i: int) -> str:
        """The right letter of item i of a `choice` task."""
        raise TaskError(f"{type(self).__name__} is no multiple choice task")


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
