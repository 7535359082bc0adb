"""Counting a letter in a word: by spelling it out, then with the calculator as a check."""

import re
from dataclasses import dataclass

from data.chat.calculator import calculate
from data.chat.conversation import Conversation
from data.tasks.task import Draw, Execute, Task, dialogue, split_words

_QUESTIONS = [
    "How many {letter} are in {word}?",
    "How many times does {letter} occur in {word}?",
    "How often is the letter {letter} in the word {word}?",
    "Count the letter {letter} in {word}.",
    "What is the number of {letter}'s in the word {word}?",
    "In the word {word}, how many letters are {letter}?",
    "Tell me how many {letter}s there are in {word}.",
    "{word}: how many {letter}?",
]
_QUOTES = ["{}", "'{}'", '"{}"']
_ANSWER = re.compile(r"#### (-?[\d.,]+)")


@dataclass(eq=False)
class SpellingBee(Task):
    """`How many r are in strawberry?` answered by a spelt-out count, a call that checks it, and `#### 3`.

    Words as in SimpleSpelling; the letter is one of the word's in two questions of three, else any. nanochat's task of
    this name asks in more ways and languages, so that scores are not comparable.
    """

    usual_tokens = 60

    shortest: int = 3
    longest: int = 15

    def __post_init__(self) -> None:
        words = split_words(self.split, self.folder, self.shortest, self.longest)
        self.words = [words[i] for i in Draw(f"bee {self.split}").order(len(words))]

    def __len__(self) -> int:
        return self.size or len(self.words)

    def problem(self, i: int) -> tuple[str, str, Draw]:
        """Word and letter of item i, and the draw to word the question with."""
        draw = Draw(f"bee {self.split} {i}")
        word = self.words[i % len(self.words)]
        letter = draw.pick(word if draw.below(3) else "abcdefghijklmnopqrstuvwxyz")
        return word, letter, draw

    def conversation(self, i: int) -> Conversation:
        word, letter, draw = self.problem(i)
        quote = draw.pick(_QUOTES)
        question = draw.pick(_QUESTIONS).format(letter=quote.format(letter), word=quote.format(word))
        call = f"'{word}'.count('{letter}')"
        found = calculate(call) or ""
        return dialogue(
            question,
            [
                {"type": "text", "text": f"{_counted(word, letter)}\n{letter} comes up {found} times. Python says "},
                {"type": "python", "text": call},
                {"type": "python_output", "text": found},
                {"type": "text", "text": f"\n#### {found}"},
            ],
        )

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        word, letter, _ = self.problem(i)
        answer = _ANSWER.search(completion)
        return float(answer is not None and answer[1].rstrip(".,") == str(word.count(letter)))


def _counted(word: str, letter: str) -> str:
    """strawberry, r: `s t a r (1) ...`, the running number behind each letter that counts."""
    seen = 0
    parts = []
    for character in word:
        seen += character == letter
        parts.append(f"{character} ({seen})" if character == letter else character)
    return " ".join(parts)
