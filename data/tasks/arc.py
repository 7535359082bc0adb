"""ARC: school science as multiple choice (Clark et al., 2018)."""

from pathlib import Path

from data.tasks.table import Table
from data.tasks.task import ChoiceTask


class ARC(ChoiceTask):
    """Data set allenai/ai2_arc. subset: ARC-Easy or ARC-Challenge. Letters are the data set's own; a few are digits."""

    usual_tokens = 90
    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        folder: Path | None = None,
        file: Path | None = None,
        subset: str = "ARC-Easy",
    ):
        super().__init__(split, size, folder, file)
        self.rows = Table(folder, f"{subset}/{split}-*.parquet", ["question", "choices", "answerKey"], size)

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, i: int) -> tuple[str, list[str], list[str], str]:
        row = self.rows[i]
        return row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"]
