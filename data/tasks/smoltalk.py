"""SmolTalk: general conversations, some with a system message (Allal et al., 2025)."""

from dataclasses import dataclass

from data.chat.conversation import Conversation
from data.tasks.task import Task


@dataclass(eq=False)
class SmolTalk(Task):
    """Data set HuggingFaceTB/smol-smoltalk, or any other with a column `messages` of role and content.

    files: their names in the data set; {split} in it stands for the split.
    """

    usual_items = 460_341
    usual_tokens = 900

    files: str = "data/{split}-*.parquet"

    def __post_init__(self) -> None:
        self.rows = self.table(self.files, ["messages"])

    def conversation(self, i: int) -> Conversation:
        return {"messages": self.rows[i]["messages"]}
