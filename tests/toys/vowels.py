"""A task that a model without any skill gets right now and then, and can learn in a few steps."""

from data.task import Task, dialogue


class Vowels(Task):
    """Right when the answer holds an e."""

    def __len__(self) -> int:
        return self.size or 12

    def conversation(self, i):
        return dialogue(f"Say {self.split} {i}{' again' * (i % 5)}", f"{i}")

    def grade(self, i, completion, execute=None):
        return float("e" in completion)
