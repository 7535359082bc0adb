"""Conversations of your own: a jsonl file with one conversation per line."""

import json
from collections import Counter
from pathlib import Path

from data.chat.conversation import Conversation
from data.chat.formats import KNOWN, Unlearnable, conversation_of, is_trained
from data.errors import DataError, DataMistake
from data.tasks.task import Draw, Task, TaskError
from data.text.files import numbered_lines, whole_all


class CustomJSON(Task):
    """Each line of `file` is a conversation in one of the forms that data/chat/formats.py reads.

    The whole file is read and checked at once. Raises DataError as FILE:LINE for a line that is not a conversation, or
    has nothing to learn because it has no message by the assistant.
    """

    def __post_init__(self) -> None:
        if self.file is None:
            raise TaskError("CustomJSON reads one file of conversations: name it in the mixture as `file: PATH`")
        conversations, self.notes = read_conversations(self.file)
        order = Draw("custom json").order(len(conversations))[: self.size]
        self.rows = [conversations[i] for i in order]

    def conversation(self, i: int) -> Conversation:
        return self.rows[i]


def read_conversations(path: Path) -> tuple[list[Conversation], dict[str, int]]:
    """All conversations of a jsonl file, which may be compressed, and counts of what was ignored or replaced.

    Empty lines are skipped. Raises DataError with FILE:LINE.
    """
    notes: Counter[str] = Counter()
    lines = numbered_lines(path)
    found = [_conversation(line, notes, f"{path}:{number}") for number, line in lines if line.strip()]
    if not found:
        raise DataMistake(f"{path}: there is no conversation in it")
    if not any(map(is_trained, found)):
        raise DataMistake(f'{path}: has no answer to learn from: each has "weight": 0')
    return found, dict(notes)


def _conversation(line: bytes, notes: Counter[str], where: str) -> Conversation:
    try:
        return conversation_of(whole_all(json.loads(line), notes), notes)
    except json.JSONDecodeError as error:
        hint = ". Write each conversation on one line, as with jq -c '.[]'" if line.strip() in (b"[", b"{") else ""
        raise DataMistake(f"{where}: no JSON ({error.msg} at column {error.colno}){hint}") from error
    except UnicodeDecodeError as error:
        raise DataMistake(f"{where}: not UTF-8 text (byte {error.start + 1} of the line)") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; lists in lists in lists
        raise DataMistake(f"{where}: JSON that cannot be read ({str(error)[:80]})") from error
    except Unlearnable as error:
        raise DataMistake(f"{where}: {error}.") from error
    except DataError as error:
        raise DataMistake(f"{where}: {error}. A line is {KNOWN}.") from error
