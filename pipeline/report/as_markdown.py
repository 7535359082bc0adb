"""A report as Markdown; pictures lie in img/ beside it."""

import re
from collections.abc import Callable
from typing import Any

from pipeline.report.document import (
    Block,
    Cell,
    Exchange,
    Exchanges,
    Facts,
    Figure,
    Notices,
    Paragraph,
    Part,
    Report,
    Table,
)

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|])")


def render(report: Report) -> str:
    parts = [f"# {_plain(report.title)}", _plain(report.subtitle)]
    for section in report.sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [RENDER[type(block)](block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text in which nothing is Markdown."""
    return SPECIAL.sub(r"\\\1", text).replace("\n", " ")


def _paragraph(block: Paragraph) -> str:
    return _plain(block.text)


def _facts(block: Facts) -> str:
    return "\n".join(f"- **{_plain(value)}** {_plain(name)}" for name, value in block.items)


def _notices(block: Notices) -> str:
    return "\n".join(f"> - {_plain(item)}" for item in block.items)


def _table(table: Table) -> str:
    rule = [":---" if i <= table.left else "---:" for i in range(len(table.header))]
    lines = ["| " + " | ".join(_plain(name) for name in table.header) + " |", "| " + " | ".join(rule) + " |"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "".join(f"\n\n{_plain(note)}" for note in table.notes)


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return _plain(cell)
    text = f"**{_plain(cell.text)}**" if cell.strong else _plain(cell.text)
    return text + (f" ({_plain(cell.detail)})" if cell.detail else "")


def _figure(figure: Figure) -> str:
    return f"![{_plain(figure.caption)}](img/{figure.name}.svg)"


def _exchanges(block: Exchanges) -> str:
    title = [f"### {_plain(block.folded)}"] if block.folded else []
    return "\n\n".join(title + [_exchange(item) for item in block.items])


def _exchange(exchange: Exchange) -> str:
    title = f"*{_plain(exchange.title)}*  \n" if exchange.title else ""
    lines = [f"{title}**{_plain(exchange.prompt)}**"]
    for answer in exchange.answers:
        mark = "" if answer.right is None else " (right)" if answer.right else " (wrong)"
        lines.append(f"- {_plain(answer.stage)}{mark}: {_said(answer.parts)}")
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def _said(parts: list[Part]) -> str:
    shown = []
    for part in parts:
        if part.kind == "text":
            shown.append(_plain(part.text))
        else:
            text = part.text.replace("`", "'").replace("\n", " ")
            shown.append(f"`{text}`" if part.kind == "python" else f"→ `{text}`")
    return " ".join(text.strip() for text in shown)


RENDER: dict[type[Block], Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Notices: _notices,
    Table: _table,
    Figure: _figure,
    Exchanges: _exchanges,
}
