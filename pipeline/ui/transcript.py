"""How a conversation is shown in the app, and which message of it a shown one belongs to."""

import html
from collections.abc import Sequence
from typing import Any

from pipeline.ui.chat import Message


def shown(conversation: Sequence[Message], pending: bool = False) -> list[dict[str, Any]]:
    """The conversation as messages of gradio.Chatbot; tool calls become entries of their own that unfold.

    pending: the last answer is still being written.
    """
    return [entry for _, entry in _entries(conversation, pending)]


def position(conversation: Sequence[Message], index: int) -> int:
    """Which message of the conversation the shown entry `index` belongs to."""
    owners = [owner for owner, _ in _entries(conversation, pending=False)]
    return owners[max(0, min(index, len(owners) - 1))] if owners else 0


def _entries(conversation: Sequence[Message], pending: bool) -> list[tuple[int, dict[str, Any]]]:
    entries = []
    for i, message in enumerate(conversation):
        open_end = pending and i == len(conversation) - 1
        if isinstance(message["content"], str):
            entries.append((i, _entry(message["role"], message["content"])))
        else:
            entries += [(i, entry) for entry in _answer(message["content"], open_end)]
    return entries


def _answer(parts: Sequence[dict[str, str]], pending: bool) -> list[dict[str, Any]]:
    """One entry for each stretch of text, one for each call with its result."""
    entries: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        if part["type"] == "text":
            if part["text"].strip():
                entries.append(_entry("assistant", part["text"]))
        elif part["type"] == "python":
            result = parts[i + 1]["text"] if i + 1 < len(parts) and parts[i + 1]["type"] == "python_output" else None
            entries.append(_tool(part["text"], result, pending and result is None))
    return entries or [_entry("assistant", "")]


def _tool(call: str, result: str | None, pending: bool) -> dict[str, Any]:
    outcome = f" = {result}" if result is not None else "" if pending else " (no result)"
    body = f"<pre>{html.escape(call)}</pre>" + (f"<pre>{html.escape(result)}</pre>" if result is not None else "")
    title = f"Calculator: `{(call + outcome).replace('`', chr(39))}`"  # titles are Markdown
    return _entry("assistant", body) | {"metadata": {"title": title, "status": "pending" if pending else "done"}}


def _entry(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
