"""A model that is made of if-statements, so that what is around it can be tested without one."""

import time
from collections.abc import Callable, Iterator
from typing import ClassVar

from pipeline.ui.chat import ChatSettings, End, Event, Text, ToolCall, ToolOutput

NAMES = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"


class ByteTokenizer:
    """One token a byte, after the specials."""

    special: ClassVar = {f"<|{name}|>": i for i, name in enumerate(NAMES.split())}

    def encode(self, text: str) -> list[int]:
        return [10 + byte for byte in text.encode()]

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 10 for i in ids if i >= 10).decode()


class EchoModel:
    """Adds where it sees a +, talks without end when asked to, fast or slowly, and else repeats what it was told."""

    BEGINNINGS = (ByteTokenizer.special["<|bos|>"], ByteTokenizer.special["<|user_start|>"])

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.settings: list[ChatSettings] = []

    def __call__(self, prompt: list[int], settings: ChatSettings, should_stop: Callable[[], bool]) -> Iterator[Event]:
        self.prompts.append(prompt)
        self.settings.append(settings)
        start = max(i for i, token in enumerate(prompt) if token in self.BEGINNINGS)
        said = ByteTokenizer().decode(prompt[start:])
        if "+" in said:
            yield from (Text("It is "), ToolCall(said), ToolOutput("7"), Text("7."))
        elif "forever" in said:
            count = 0
            while not should_stop():
                count += 1
                yield Text("on and ")
            yield End("stop", count, 0.0)
            return
        elif "slowly" in said:
            count = 0
            while not should_stop():
                count += 1
                yield Text(f"line {count}\n\n")
                time.sleep(0.02)
            yield End("stop", count, 0.0)
            return
        else:
            yield from (Text(word) for word in ("You said: ", said))
        yield End("end", 4, 0.0)
