"""ARC: school science as multiple choice (Clark et al., 2018)."""

from dataclasses import dataclass

from data.tasks.task import ChoiceTask


@dataclass(eq=False)
class ARC(ChoiceTask):
    """Data set allenai/ai2_arc. subset: ARC-Easy or ARC-Challenge. Letters are the data set's own; a few are digits."""

    usual_tokens = 90
    splits = ("train", "validation", "test")

    subset: str = "ARC-Easy"

    def __post_init__(self) -> None:
        self.rows = self.table(f"{self.subset}/{{split}}-*.parquet", ["question", "choices", "answerKey"])

    def question(self, i: int) -> tuple[str, list[str], list[str], str]:
        row = self.rows[i]
        return row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"]
