"""SmolTalk: general conversations, some with a system message (Allal et al., 2025)."""

from pathlib import Path

from data.chat.conversation import Conversation
from data.tasks.table import Table
from data.tasks.task import Task


class SmolTalk(Task):
    """Data set HuggingFaceTB/smol-smoltalk, or any other with a column `messages` of role and content.

    files: where in the data set they are; {split}, if it is in there, stands for the split.
    """

    usual_items = 460_341
    usual_tokens = 900

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        folder: Path | None = None,
        file: Path | None = None,
        files: str = "data/{split}-*.parquet",
    ):
        super().__init__(split, size, folder, file)
        self.rows = Table(folder, files.format(split=split), ["messages"], size)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> Conversation:
        return {"messages": self.rows[i]["messages"]}
