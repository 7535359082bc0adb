"""Writing a word letter by letter."""

from pathlib import Path

from data.chat.conversation import Conversation, spoken
from data.tasks.draw import Draw
from data.tasks.task import Execute, Task, dialogue
from data.tasks.words import split_words

_QUESTIONS = ["Spell the word: {word}", "Spell {word}", "How do you spell {word}?", "What are the letters of {word}?"]


class SimpleSpelling(Task):
    """`Spell the word: apple` answered by `a p p l e`; nanochat's task of this name answers `apple:a,p,p,l,e`.

    Words come from the word list of the data set. A word is for "test" or for training by itself alone, as in
    SpellingBee. When size asks for more items than there are words, words come again, worded differently.
    longest: letters.
    """

    usual_tokens = 20

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        folder: Path | None = None,
        file: Path | None = None,
        shortest: int = 3,
        longest: int = 10,
    ):
        super().__init__(split, size, folder, file)
        words = split_words(split, folder, shortest, longest)
        self.words = [words[i] for i in Draw(f"spelling {split}").order(len(words))]

    def __len__(self) -> int:
        return self.size or len(self.words)

    def word(self, i: int) -> str:
        return self.words[i % len(self.words)]

    def conversation(self, i: int) -> Conversation:
        word = self.word(i)
        question = Draw(f"spelling {self.split} {i}").pick(_QUESTIONS)
        return dialogue(question.format(word=word), " ".join(word))

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        return float(spoken(completion).lower().split() == list(self.word(i)))
