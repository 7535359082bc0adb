"""A task that a model without any skill gets right now and then, and can learn in a few steps."""

from data.tasks.task import Check, Task, dialogue


class Vowels(Task):
    """Right when the answer holds an e."""

    def __len__(self) -> int:
        return self.size or 12

    def conversation(self, i):
        return dialogue(f"Say {self.split} {i}{' again' * (i % 5)}", f"{i}")

    def grade(self, i, completion, execute=None):
        return float("e" in completion)


class Judged(Vowels):
    """The same, said by a check of what a program returns."""

    runs_programs = True

    def grade(self, i, completion, execute=None):
        program = f"def answer():\n    return {completion!r}\n"
        return float(bool(execute(program, Check("def check(candidate):\n    assert 'e' in candidate()\n", "answer"))))


class Undeclared(Vowels):
    """The same, said by a program itself."""

    def grade(self, i, completion, execute=None):
        return float(bool(execute(f"assert 'e' in {completion!r}")))


class Advisory(Undeclared):
    advisory = True
