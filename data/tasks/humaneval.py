"""HumanEval: Python functions written from their docstrings and tried on their tests (Chen et al., 2021)."""

import re
from dataclasses import dataclass

from data.chat.conversation import Conversation, spoken
from data.tasks.task import Check, Execute, Task, TaskError, dialogue

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@dataclass(eq=False)
class HumanEval(Task):
    """Data set openai/openai_humaneval; it has a split "test" only.

    A completion passes when its code runs through the problem's tests. The code is the first fenced block, or all of
    the text; it may define the function or continue where the prompt ends.
    """

    splits = ("test",)
    runs_programs = True

    split: str = "test"

    def __post_init__(self) -> None:
        columns = ["prompt", "canonical_solution", "test", "entry_point"]
        self.rows = self.table("openai_humaneval/{split}-*.parquet", columns)

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        return dialogue(row["prompt"], row["prompt"] + row["canonical_solution"])

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        if execute is None:
            raise TaskError("HumanEval runs what the model wrote, and needs a sandbox to do so")
        return float(bool(execute(self.program(i, completion), self.check(i))))

    def program(self, i: int, completion: str) -> str:
        """The program to run: the completion's code, after the part of the prompt that it does not repeat."""
        row = self.rows[i]
        before, name, text = row["prompt"], row["entry_point"], spoken(completion)
        fenced = _FENCE.search(text)
        code = fenced[1] if fenced else text
        if re.search(rf"^def {name}\b", code, re.MULTILINE):
            before = before.partition(f"def {name}")[0]
        return f"{before}{code}\n"

    def check(self, i: int) -> Check:
        """The problem's tests, after its prompt, as some use a function that the prompt defines."""
        row = self.rows[i]
        return Check(f"{row['prompt']}\n\n{row['test']}\n", row["entry_point"])
