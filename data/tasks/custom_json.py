"""Conversations of your own: a jsonl file with one conversation a line."""

import json
from pathlib import Path
from typing import Any

from data.conversation import Conversation, check
from data.draw import Draw
from data.errors import DataError, DataMistake
from data.task import Task, TaskError


class CustomJSON(Task):
    """Each line of `file` is a JSON list of {"role", "content"} messages, or an object with such a list as `messages`.

    The whole file is read and checked at once. Raises DataError as FILE:LINE for a line that is no conversation, or
    that has nothing to learn because no assistant speaks in it.
    """

    def __init__(
        self, split: str = "train", size: int | None = None, folder: Path | None = None, file: Path | None = None
    ):
        super().__init__(split, size, folder, file)
        if file is None:
            raise TaskError("CustomJSON reads one file of conversations: name it in the mixture as `file: PATH`")
        conversations = read_conversations(file)
        order = Draw("custom json").order(len(conversations))[:size]
        self.conversations = [conversations[i] for i in order]

    def __len__(self) -> int:
        return len(self.conversations)

    def conversation(self, i: int) -> Conversation:
        return self.conversations[i]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a jsonl file; empty lines are skipped. Raises DataError with FILE:LINE."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataMistake(f"{path}: cannot be read ({error.strerror})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))))
        except json.JSONDecodeError as error:
            raise DataMistake(f"{path}:{number}: no JSON ({error.msg} at column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise DataMistake(f"{path}:{number}: not UTF-8 text (byte {error.start + 1} of the line)") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits; lists in lists in lists
            raise DataMistake(f"{path}:{number}: JSON that cannot be read ({str(error)[:80]})") from error
        except DataError as error:
            raise DataMistake(
                f'{path}:{number}: {error}. A line is [{{"role": "user", "content": "..."}}, '
                '{"role": "assistant", "content": "..."}]'
            ) from error
    if not found:
        raise DataMistake(f"{path}: there is no conversation in it")
    return found


def _conversation(value: Any) -> Conversation:
    conversation = {"messages": value} if isinstance(value, list) else value
    check(conversation)
    if conversation["messages"][-1]["role"] != "assistant":
        raise DataMistake("a conversation to learn from ends with the assistant")
    return conversation
