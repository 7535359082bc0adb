"""What a report is made of, before it is Markdown or HTML."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Cell:
    """text, and below it in small print a detail."""

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the row and is set to the left; `left` more columns are too. notes stand below."""

    header: list[str]
    rows: list[list[Cell | str]]
    left: int = 0
    notes: list[str] = field(default_factory=list)
    total: bool = False  # the last row sums up the others


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Facts:
    """A few numbers that stand out, with what they are."""

    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """An SVG picture; `name` is its file's."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Notices:
    """What a reader must know before trusting a number."""

    items: list[str]


@dataclass(frozen=True)
class Part:
    """A stretch of what somebody said: text, a tool call or a tool's result."""

    kind: Literal["text", "python", "python_output"]
    text: str


@dataclass(frozen=True)
class Answer:
    """What one stage's model said; right is None where nobody graded it."""

    stage: str
    parts: list[Part]
    right: bool | None = None


@dataclass(frozen=True)
class Exchange:
    """A prompt and what came back. continued: the answers go on with the prompt's text instead of replying to it."""

    title: str
    prompt: str
    answers: list[Answer]
    continued: bool = False


@dataclass(frozen=True)
class Exchanges:
    """folded: shown only when asked for."""

    items: list[Exchange]
    folded: str = ""


Block = Table | Paragraph | Facts | Figure | Notices | Exchanges


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    sections: list[Section]

    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
