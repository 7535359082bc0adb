"""A task: is a number even?"""

from data.chat.conversation import Conversation
from data.tasks.task import Draw, Execute, Task, dialogue, held_out


class Parity(Task):
    def number(self, i: int) -> int:
        """The number of item i. A number by itself decides whether it is for evaluation, so that none is in both."""
        draws = (Draw(f"parity {i} {again}").below(10_000) for again in range(1000))
        return next(n for n in draws if held_out(f"parity {n}") == (self.split == "test"))

    def __len__(self) -> int:
        return self.size or 1000

    def conversation(self, i: int) -> Conversation:
        n = self.number(i)
        return dialogue(f"Is {n} even?", "no" if n % 2 else "yes")

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        return float(completion.strip() == ("no" if self.number(i) % 2 else "yes"))
