"""MMLU: multiple choice over 57 subjects (Hendrycks et al., 2021)."""

from dataclasses import dataclass

from data.tasks.task import ChoiceTask, TaskError

_LETTERS = ["A", "B", "C", "D"]


@dataclass(eq=False)
class MMLU(ChoiceTask):
    """Data set cais/mmlu. subset: all (splits test, validation, dev) or auxiliary_train (split train)."""

    usual_items = 99_842
    usual_tokens = 390  # auxiliary_train is much of it reading comprehension
    splits = ("train", "dev", "validation", "test")

    subset: str = "all"

    def __post_init__(self) -> None:
        # The published auxiliary_train files hold each row as one struct.
        self.nested = self.subset == "auxiliary_train"
        if self.nested != (self.split == "train"):
            raise TaskError(
                f"MMLU has no split {self.split!r} in subset {self.subset!r}: auxiliary_train is what it trains on"
            )
        columns = ["train"] if self.nested else ["question", "choices", "answer"]
        self.rows = self.table(f"{self.subset}/{{split}}-*.parquet", columns)

    def question(self, i: int) -> tuple[str, list[str], list[str], str]:
        row = self.rows[i]["train"] if self.nested else self.rows[i]
        return row["question"], row["choices"], _LETTERS, _LETTERS[row["answer"]]
