"""Many tasks as one list of conversations."""

from collections.abc import Sequence

from data.chat.conversation import Conversation
from data.tasks.draw import Draw
from data.tasks.task import Task


class TaskSequence:
    """Tasks one after the other, each in its own order; a task repeated comes whole, as often."""

    def __init__(self, tasks: Sequence[Task], repeats: Sequence[int]):
        self.tasks = tasks
        self.items = [
            (task, i)
            for task, repeat in zip(range(len(tasks)), repeats, strict=True)
            for _ in range(repeat)
            for i in range(len(tasks[task]))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Conversation:
        task, item = self.items[i]
        return self.tasks[task].conversation(item)


class TaskMixture(TaskSequence):
    """All items of all tasks, each as often as its task is repeated, shuffled; the same for the same seed."""

    def __init__(self, tasks: Sequence[Task], repeats: Sequence[int], seed: int = 0):
        super().__init__(tasks, repeats)
        self.items = [self.items[i] for i in Draw(f"mixture {seed}").order(len(self.items))]
