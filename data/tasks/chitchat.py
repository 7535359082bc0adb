"""Greetings and thanks, for a model too small to learn conversation from real ones."""

from itertools import product

from data.chat.conversation import Conversation
from data.tasks.task import Draw, Task, dialogue

_TALK = [
    (
        ["Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Greetings"],
        ["Hello! How can I help you?", "Hi! What can I do for you?"],
    ),
    (
        ["How are you", "How are you doing", "How do you do", "How is it going", "Are you well"],
        ["I am fine, thank you. How can I help you?", "Very well, thank you."],
    ),
    (
        ["Thank you", "Thanks", "Thanks a lot", "Many thanks", "Thank you very much", "That was helpful"],
        ["You are welcome!", "My pleasure."],
    ),
    (
        ["Goodbye", "Bye", "See you", "See you later", "Good night", "I have to go"],
        ["Goodbye!", "See you!"],
    ),
    (
        ["What can you do", "How can you help me", "What are you good at", "What can I ask you", "Help", "Help me"],
        ["I can calculate and spell. Ask me what 12 times 34 is, or how a word is spelt."],
    ),
    (
        ["Well done", "Great", "Good job", "Very good", "Nice", "I like you", "You are clever"],
        ["Thank you!", "That is kind of you."],
    ),
]
_ENDS = ["", ".", "!", "?"]


class Chitchat(Task):
    """Greetings, thanks and the like with an answer each; in every third conversation two of them follow each other."""

    def __post_init__(self) -> None:
        self.exchanges = [
            (said + end, answer)
            for phrases, answers in _TALK
            for i, (said, end) in enumerate(product(phrases, _ENDS))
            for answer in [answers[i % len(answers)]]
        ]

    def __len__(self) -> int:
        return self.size or len(self.exchanges)

    def conversation(self, i: int) -> Conversation:
        draw = Draw(f"chitchat {self.split} {i}")
        turns = list(draw.pick(self.exchanges))
        if draw.below(3) == 0:
            turns += draw.pick(self.exchanges)
        return dialogue(*turns)
