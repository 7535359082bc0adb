"""Printing of text that may come from elsewhere: its control characters are shown, so that no terminal obeys them."""

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.segment import Segment

from data.trust import printable


class PlainConsole(Console):
    """Colours and tables are rich's; brackets in a text are brackets, and its control characters become visible."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(text: object, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text that may come from elsewhere."""
    print(printable(str(text)), end=end, file=file, flush=True)
