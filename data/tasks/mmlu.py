"""MMLU: multiple choice over 57 subjects (Hendrycks et al., 2021)."""

from pathlib import Path

from data.tasks.table import Table
from data.tasks.task import ChoiceTask, TaskError

_LETTERS = ["A", "B", "C", "D"]


class MMLU(ChoiceTask):
    """Data set cais/mmlu. subset: all (splits test, validation, dev) or auxiliary_train (split train)."""

    usual_items = 99_842
    usual_tokens = 390  # auxiliary_train is much of it reading comprehension
    splits = ("train", "dev", "validation", "test")

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        folder: Path | None = None,
        file: Path | None = None,
        subset: str = "all",
    ):
        super().__init__(split, size, folder, file)
        if (subset == "auxiliary_train") != (split == "train"):
            raise TaskError(f"MMLU has no split {split!r} in subset {subset!r}: auxiliary_train is what it trains on")
        # The published auxiliary_train files hold each row as one struct.
        self.nested = subset == "auxiliary_train"
        columns = ["train"] if self.nested else ["question", "choices", "answer"]
        self.rows = Table(folder, f"{subset}/{split}-*.parquet", columns, size)

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, i: int) -> tuple[str, list[str], list[str], str]:
        row = self.rows[i]["train"] if self.nested else self.rows[i]
        return row["question"], row["choices"], _LETTERS, _LETTERS[row["answer"]]
