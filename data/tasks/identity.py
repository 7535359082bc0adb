"""The model's identity: a small personality from templates, or your own from a file."""

from dataclasses import dataclass
from itertools import product

from data.chat.conversation import Conversation, spoken
from data.tasks.custom_json import read_conversations
from data.tasks.task import Draw, Execute, Task, dialogue

_OPENERS = ["", "Hi! ", "Hello. ", "Hey, ", "Excuse me, ", "Good evening. ", "One question: ", "Okay, "]
# fmt: off
_QUESTIONS = {
    "name": [
        "What is your name?", "What's your name?", "What are you called?", "Tell me your name.",
        "Tell me your name, please.", "Do you have a name?", "Have you got a name?", "Can you tell me your name?",
        "May I ask your name?", "What should I call you?", "What can I call you?", "How should I address you?",
        "How do they call you?", "What is the name of this model?", "What is this model called?", "Your name?",
        "Please tell me what you are called.", "I would like to know what your name is.",
        "I want to know what you are called.", "Could I have your name, please?", "Under which name do you work?",
        "State your name.", "I forgot your name.", "Remind me of your name.",
    ],
    "who": [
        "Who are you?", "Who are you really?", "And who are you?", "Who is it?", "Who am I talking to?",
        "Who am I talking with?", "Who is this?", "Who is answering me?", "Introduce yourself.",
        "Please introduce yourself.", "Could you introduce yourself?", "Tell me about yourself.",
        "Tell me who you are.", "Tell me something about you.", "With whom am I speaking?", "Whom am I writing to?",
        "Whom do I have here?", "Who is talking to me?", "Who answers my questions?", "Who is there?",
        "Can you say who you are?", "Do you know who you are?", "I do not know you. Who are you?", "Describe yourself.",
        "Describe yourself in one sentence.",
    ],
    "what": [
        "What are you?", "What exactly are you?", "Are you a human?", "Are you human or not?", "Are you a person?",
        "Are you a robot?", "Are you a machine?", "Are you an AI?", "Are you ChatGPT?", "What kind of model are you?",
        "Which model are you?", "Which model is this?", "Which program do I talk to?", "Which assistant is this?",
        "Which assistant are you?", "What sort of program are you?", "Am I talking to a person?", "Is this a machine?",
    ],
    "how": [
        "How were you made?", "Who made you?", "Who created you?", "Who trained you?", "How were you trained?",
        "Where do you come from?", "Who wrote you?", "Who programmed you?", "Who developed you?",
        "What are you made of?", "Who is your maker?", "Where were you made?",
    ],
}
# fmt: on
_ANSWERS = {
    "name": ["My name is {name}.", "I am {name}.", "I am called {name}.", "You can call me {name}."],
    "who": ["I am {name}, {description}.", "My name is {name}. I am {description}."],
    "what": ["I am {name}, {description}.", "I am a language model, and my name is {name}."],
    "how": ["I am {name}, and I was trained by {maker}.", "My name is {name}. I was made by {maker}."],
}
# Asked in evaluation only, each once.
HELD_OUT = [
    "Could you tell me what your name is?", "So, who are you?", "What do people call you?",
    "I'd like to know your name.", "What name do you go by?", "Who is speaking?", "Please say your name.",
    "And you are?", "Good morning, who are you?", "By what name are you known?", "Which model am I talking to?",
    "Give me your name.", "Who exactly are you?", "Can you introduce yourself to me?",
    "What is the name of this assistant?", "Whom am I chatting with?", "Are you a person or a machine?",
    "What was your name again?", "Would you tell me who you are?", "Who built you?",
]  # fmt: skip


@dataclass(eq=False)
class Identity(Task):
    """Questions about who the model is. In "test", 20 wordings that are in no training set, graded by the name.

    name, description, maker: for the answers from templates.
    file: train on the conversations of this jsonl file instead (as CustomJSON does); `name` is then the name in these
    conversations, for grading.
    """

    name: str = "Chatmill"
    description: str = "a small language model"
    maker: str = "the Chatmill pipeline"

    def __post_init__(self) -> None:
        if self.split == "test":
            self.conversations = [dialogue(question, f"My name is {self.name}.") for question in HELD_OUT]
        elif self.file:
            self.conversations, self.notes = read_conversations(self.file)
        else:
            self.conversations = from_templates(self.name, self.description, self.maker)
        order = Draw("identity").order(len(self.conversations))
        self.order = order if self.split == "train" else sorted(order)

    def __len__(self) -> int:
        return self.size or len(self.conversations)

    def conversation(self, i: int) -> Conversation:
        return self.conversations[self.order[i % len(self.order)]]

    def grade(self, i: int, completion: str, execute: Execute | None = None) -> float:
        return float(self.name.casefold() in spoken(completion).casefold())


def from_templates(name: str, description: str, maker: str) -> list[Conversation]:
    """Every training question behind every opener, each fourth in small letters, with the answers in turn."""
    made = []
    for subject, questions in _QUESTIONS.items():
        for q, o in product(range(len(questions)), range(len(_OPENERS))):
            asked = _OPENERS[o] + questions[q]
            answer = _ANSWERS[subject][(q + o) % len(_ANSWERS[subject])]
            answer = answer.format(name=name, description=description, maker=maker)
            made.append(dialogue(asked.lower() if (q + o) % 4 == 3 else asked, answer))
    return made
