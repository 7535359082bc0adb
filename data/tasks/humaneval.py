"""HumanEval: Python functions written from their docstrings and tried on their tests (Chen et al., 2021)."""

import re
from pathlib import Path

from data.chat.conversation import Conversation, spoken
from data.tasks.table import Table
from data.tasks.task import Check, Execute, Task, TaskError, dialogue

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class HumanEval(Task):
    """Data set openai/openai_humaneval; it has a split "test" only.

    A completion passes when its code runs through the problem's tests. The code is the first fenced block, or all of
    the text; it may define the function or go on where the prompt ends.
    """

    splits = ("test",)
    runs_programs = True

    def __init__(
        self, split: str = "test", size: int | None = None, folder: Path | None = None, file: Path | None = None
    ):
        super().__init__(split, size, folder, file)
        columns = ["prompt", "canonical_solution", "test", "entry_point"]
        self.rows = Table(folder, f"openai_humaneval/{split}-*.parquet", columns, size)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        return dialogue(row["prompt"], row["prompt"] + row["canonical_solution"])

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        if execute is None:
            raise TaskError("HumanEval runs what the model wrote, and needs a sandbox to do so")
        return float(bool(execute(self.program(i, completion), self.check(i))))

    def program(self, i: int, completion: str) -> str:
        """The program to run: the completion's code, after what the prompt has before the function."""
        row = self.rows[i]
        name = row["entry_point"]
        said = spoken(completion)
        fenced = _FENCE.search(said)
        code = fenced.group(1) if fenced else said
        if re.search(rf"^def {name}\b", code, re.MULTILINE):
            before = row["prompt"].partition(f"def {name}")[0]
        else:
            before = row["prompt"]
        return f"{before}{code}\n"

    def check(self, i: int) -> Check:
        """The problem's tests, after its prompt, as some use a function that the prompt defines."""
        row = self.rows[i]
        return Check(f"{row['prompt']}\n\n{row['test']}\n", row["entry_point"])
