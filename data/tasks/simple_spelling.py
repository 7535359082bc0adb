"""Writing a word letter by letter."""

from dataclasses import dataclass

from data.chat.conversation import Conversation, spoken
from data.tasks.task import Draw, Execute, Task, dialogue, split_words

_QUESTIONS = ["Spell the word: {word}", "Spell {word}", "How do you spell {word}?", "What are the letters of {word}?"]


@dataclass(eq=False)
class SimpleSpelling(Task):
    """`Spell the word: apple` answered by `a p p l e`; nanochat's task of this name answers `apple:a,p,p,l,e`.

    Words come from the word list of the data set, with `shortest` to `longest` letters. The word alone decides whether
    it is for "test" or for training, as in SpellingBee. A size larger than the number of words repeats words, with
    other questions.
    """

    usual_tokens = 20

    shortest: int = 3
    longest: int = 10

    def __post_init__(self) -> None:
        words = split_words(self.split, self.folder, self.shortest, self.longest)
        self.words = [words[i] for i in Draw(f"spelling {self.split}").order(len(words))]

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
