"""GSM8K: school maths in words, solved step by step with the calculator (Cobbe et al., 2021)."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from data.chat.conversation import Conversation
from data.tasks.task import Execute, Task, dialogue

_CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_ANSWER = re.compile(r"#### (-?[\d.,]+)")


@dataclass(eq=False)
class GSM8K(Task):
    """Data set openai/gsm8k. A note <<48/2=24>> becomes the call 48/2 and its output 24.

    subset: main or socratic. Graded by the number after the first `####`.
    """

    usual_items = 7_473
    usual_tokens = 190

    subset: str = "main"

    def __post_init__(self) -> None:
        self.rows = self.table(f"{self.subset}/{{split}}-*.parquet", ["question", "answer"])

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        return dialogue(row["question"], with_calls(row["answer"]))

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        wanted = final_number(self.rows[i]["answer"])
        return float(wanted is not None and final_number(completion) == wanted)


def with_calls(answer: str) -> list[dict[str, str]]:
    """The answer as parts: its text, and each note as a call with its output."""
    parts = []
    end = 0
    for note in _CALL.finditer(answer):
        if text := answer[end : note.start()]:
            parts.append({"type": "text", "text": text})
        parts.append({"type": "python", "text": note.group(1)})
        parts.append({"type": "python_output", "text": note.group(2)})
        end = note.end()
    if text := answer[end:]:
        parts.append({"type": "text", "text": text})
    return parts


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`: 1,000 and 1000.0 are the same."""
    found = _ANSWER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found.group(1).replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
