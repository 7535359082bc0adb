"""The words that Python's own library is written in, as a data set: words for the spelling tasks without a network."""

from typing import Any

from data.source import Made, Request
from data.sources import pydocs


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any]:
    """Which Python's words these are; needs no network."""
    return pydocs.identity(params, memory, online)


def make(request: Request) -> Made:
    """words.txt, a word a line, sorted."""
    from data.words import python_words

    (request.out / "words.txt").write_text("".join(word + "\n" for word in sorted(python_words())), encoding="utf-8")
    return Made(["words.txt"])
