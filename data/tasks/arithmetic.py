"""Sums to be calculated: asked in many wordings, answered through a call of the calculator."""

import re
from dataclasses import dataclass

from data.chat.calculator import calculate
from data.chat.conversation import Conversation, spoken
from data.tasks.task import Draw, Execute, Task, TaskError, dialogue, held_out

_SIGNS = {"plus": "+", "minus": "-", "times": "*", "remainder": "%"}

# Ways to name the value, and ways to tell someone to find it.
_VALUES = {
    "plus": ["{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}"],
    "minus": ["{a} - {b}", "{a}-{b}", "{a} minus {b}", "the difference of {a} and {b}"],
    "times": ["{a} * {b}", "{a}*{b}", "{a} times {b}", "the product of {a} and {b}"],
    "remainder": ["{a} % {b}", "{a} mod {b}", "the remainder of {a} divided by {b}"],
}
_ORDERS = {
    "plus": ["add {a} and {b}", "add {b} to {a}"],
    "minus": ["subtract {b} from {a}", "take {b} away from {a}"],
    "times": ["multiply {a} by {b}", "multiply {a} and {b}"],
    "remainder": ["divide {a} by {b} and give the remainder"],
}
_VALUE_FRAMES = [
    "What is {x}?", "What's {x}?", "What is {x}", "{x}", "{x} = ?", "{x}?", "{x} is what?", "Calculate {x}.",
    "Compute {x}", "Find {x}.", "Evaluate {x}", "Work out {x}.", "Tell me {x}.", "Give me {x}, please.",
    "How much is {x}?", "How much does {x} make?", "What does {x} equal?", "What do you get for {x}?",
    "Do you know what {x} is?", "Can you calculate {x}?", "Could you tell me {x}?", "Please calculate {x}.",
    "I would like to know {x}.", "My question is: what is {x}?", "What does {x} add up to?", "What does {x} give me?",
    "{x} gives what?", "{x} makes how much?", "If I take {x}, what do I get?", "For {x} I get what?",
    "The answer to {x} is?", "Let me know what {x} is.",
]  # fmt: skip
_ORDER_FRAMES = [
    "{x}", "{x}.", "Please {x}.", "{x}, please.", "Can you {x}?", "Would you {x}?", "You should {x}.",
    "{x} and tell me.", "I ask you to {x}.", "First {x}, then stop.",
]  # fmt: skip
# Asked in evaluation only.
_NEW_VALUE_FRAMES = [
    "Please work out {x}.", "What does {x} come to?", "I need to know {x}.", "Can you find {x} for me?",
]  # fmt: skip
_NEW_ORDER_FRAMES = ["Could you {x} for me?", "I want you to {x}.", "Now {x}, please."]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TRIES = 10_000


@dataclass(eq=False)
class Arithmetic(Task):
    """`What is 37 + 58?` answered by the call 37+58, its result, and a sentence with it.

    operations: frequencies in proportion, of plus, minus, times, remainder.
    max_value: operands go from 0 to this, each as likely as any other (a remainder's divisor from 2 to 99).
    seed: another draw of the same kind.
    A problem belongs to "test" or to training by its operands and operation alone (3 + 5 goes with 5 + 3); half of the
    questions of "test" are worded as no training question is. Grading looks at the last number in the answer.
    """

    operations: dict[str, float] | None = None
    max_value: int = 999
    seed: int = 0

    def __post_init__(self) -> None:
        self.weights = self.operations or {"plus": 1, "minus": 1, "times": 1}
        if unknown := set(self.weights) - set(_SIGNS):
            raise TaskError(f"Arithmetic knows no operation {', '.join(sorted(unknown))}: it has {', '.join(_SIGNS)}")
        if self.max_value < 9 or sum(self.weights.values()) <= 0 or min(self.weights.values()) < 0:
            raise TaskError("Arithmetic needs a max_value of at least 9 and weights that are not all 0")

    def __len__(self) -> int:
        return self.size or 10_000

    def problem(self, i: int) -> tuple[str, int, int, Draw]:
        """Operation and operands of problem i, and the draw to word it with."""
        draw = Draw(f"arithmetic {self.split} {self.max_value} {self.seed} {i}")
        operation = draw.weighted(list(self.weights), list(self.weights.values()))
        for _ in range(_TRIES):
            a, b = draw.below(self.max_value + 1), draw.below(self.max_value + 1)
            if operation == "remainder":
                b = max(2, b % 100)
            if is_held_out(operation, a, b) == (self.split == "test"):
                return operation, a, b, draw
        raise TaskError(f"Arithmetic: no {operation} with numbers to {self.max_value} falls into {self.split!r}")

    def conversation(self, i: int) -> Conversation:
        operation, a, b, draw = self.problem(i)
        call = f"{a}{_SIGNS[operation]}{b}"
        result = calculate(call) or ""
        answer = {"python": call, "python_output": result, "text": f"The answer is {result}."}
        parts = [{"type": kind, "text": text} for kind, text in answer.items()]
        return dialogue(self._question(operation, a, b, draw), parts)

    def _question(self, operation: str, a: int, b: int, draw: Draw) -> str:
        new = self.split == "test" and draw.below(2) == 1
        order = draw.below(3) == 0
        phrase = draw.pick((_ORDERS if order else _VALUES)[operation]).format(a=a, b=b)
        seen, unseen = (_ORDER_FRAMES, _NEW_ORDER_FRAMES) if order else (_VALUE_FRAMES, _NEW_VALUE_FRAMES)
        question = draw.pick(unseen if new else seen).format(x=phrase)
        return question[0].upper() + question[1:] if draw.below(4) else question.lower()

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        operation, a, b, _ = self.problem(i)
        numbers = _NUMBER.findall(spoken(completion))
        return float(bool(numbers) and numbers[-1].replace(",", "") == calculate(f"{a}{_SIGNS[operation]}{b}"))


def is_held_out(operation: str, a: int, b: int) -> bool:
    """Return True if a problem is for evaluation only, however it is worded and whichever operand comes first."""
    if operation in ("plus", "times"):
        a, b = sorted((a, b))
    return held_out(f"{a} {operation} {b}")
