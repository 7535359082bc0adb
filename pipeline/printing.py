"""Printing of text that may come from elsewhere: control characters become visible, so that no terminal obeys them."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.segment import Segment
from rich.table import Table

from data.trust import printable


class PlainConsole(Console):
    """A rich console without markup: brackets in a text are brackets, and control characters become visible."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(text: object, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text that may come from elsewhere."""
    print(printable(str(text)), end=end, file=file, flush=True)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]] = (), right: Collection[str] = (), fold: Collection[str] = ()
) -> Table:
    """A table without lines. right: columns aligned there. fold: columns that wrap, where others are cut off."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        overflow: Literal["fold", "ellipsis"] = "fold" if column in fold else "ellipsis"
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, overflow=overflow, no_wrap=column not in fold, justify=justify)
    for row in rows:
        made.add_row(*row)
    return made
