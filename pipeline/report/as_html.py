"""A report as one HTML file that needs nothing else: pictures and styles are inside."""

import base64
from collections.abc import Callable
from html import escape
from typing import Any

from pipeline.report.document import (
    Answer,
    Block,
    Cell,
    Exchange,
    Exchanges,
    Facts,
    Figure,
    Notices,
    Paragraph,
    Report,
    Section,
    Table,
)

CSS = """
:root { color-scheme: light; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --accent: #0f766e; --wash: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 ui-sans-serif, system-ui, -apple-system,
  "Segoe UI", Roboto, Helvetica, Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main, header > div, footer { max-width: 980px; margin: 0 auto; padding: 0 24px; }
header { border-bottom: 1px solid var(--line); background: var(--wash); padding: 30px 0 0; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 2px; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 44px 0 14px; padding-top: 4px; }
header p { color: var(--soft); margin: 0 0 16px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding-bottom: 12px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
p { margin: 0 0 12px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; margin: 0 0 16px; }
.facts div { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.facts b { display: block; font-size: 19px; white-space: nowrap; line-height: 1.25; letter-spacing: -0.01em; }
.facts span { color: var(--soft); font-size: 13px; }
.notices { border-left: 3px solid #d97706; background: #fffbeb; border-radius: 0 8px 8px 0; margin: 0 0 16px; }
.notices { padding: 10px 16px; }
.notices li { margin: 2px 0; }
.notices ul { margin: 0; padding-left: 18px; }
.wide { overflow-x: auto; margin: 0 0 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; border-bottom-color: #cbd5e1; white-space: nowrap; }
td { white-space: nowrap; }
th.left, td.left { text-align: left; }
td:first-child { font-weight: 500; }
td small { display: block; color: var(--soft); font-size: 12px; font-weight: 400; }
tr.total td { font-weight: 600; border-bottom: none; border-top: 1px solid #cbd5e1; }
.note { color: var(--soft); font-size: 13px; margin: 0 0 4px; }
.note:last-of-type { margin-bottom: 16px; }
figure { margin: 18px 0 22px; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
.exchange { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; margin: 0 0 10px; }
.exchange .title { color: var(--soft); font-size: 12px; margin-bottom: 4px; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; margin-bottom: 6px; }
.answer { display: grid; grid-template-columns: 92px 1fr; gap: 10px; padding: 5px 0; border-top: 1px solid #f1f5f9; }
.answer .who { color: var(--soft); font-size: 13px; }
.answer .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.right { color: #047857; } .wrong { color: #b91c1c; }
.tool { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #ecfdf5; padding: 1px 6px; }
.tool { border: 1px solid #a7f3d0; border-radius: 6px; white-space: pre-wrap; }
.tool.output { background: #f1f5f9; border-color: #cbd5e1; margin: 0 4px 0 2px; }
.tool.output::before { content: "= "; color: var(--soft); }
details { margin: 0 0 12px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 10px; }
footer { color: var(--soft); font-size: 13px; padding: 32px 24px 40px; }
@media (max-width: 560px) {
  main, header > div, footer { padding-left: 16px; padding-right: 16px; }
  .answer { grid-template-columns: 1fr; gap: 0; } h1 { font-size: 23px; }
  figure { overflow-x: auto; } figure img { max-width: none; width: 640px; } }
@media print { nav { display: none; } header { background: none; } figure, .exchange, tr { break-inside: avoid; } }
"""


def render(report: Report) -> str:
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in report.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><div><h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p><nav>{links}</nav></div></header>\n"
        f"<main>\n{''.join(_section(section) for section in report.sections)}</main>\n"
        "<footer>Made by Chatmill from the artifacts named under Lineage.</footer>\n</body>\n</html>\n"
    )


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section) -> str:
    blocks = "\n".join(RENDER[type(block)](block) for block in section.blocks)
    return f'<section>\n<h2 id="{_anchor(section)}">{escape(section.title)}</h2>\n{blocks}\n</section>\n'


def _paragraph(block: Paragraph) -> str:
    return f"<p>{escape(block.text)}</p>"


def _facts(block: Facts) -> str:
    cards = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in block.items)
    return f'<div class="facts">{cards}</div>'


def _notices(block: Notices) -> str:
    return f'<div class="notices"><ul>{"".join(f"<li>{escape(item)}</li>" for item in block.items)}</ul></div>'


def _table(table: Table) -> str:
    def side(column: int) -> str:
        return ' class="left"' if column <= table.left else ""

    head = "".join(f"<th{side(i)}>{escape(name)}</th>" for i, name in enumerate(table.header))
    lines = []
    for number, row in enumerate(table.rows):
        mark = ' class="total"' if table.total and number == len(table.rows) - 1 else ""
        cells = "".join(f"<td{side(i)}>{_cell(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr{mark}>{cells}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{notes}'


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
    return text + (f"<small>{escape(cell.detail)}</small>" if cell.detail else "")


def _figure(figure: Figure) -> str:
    """As an image rather than in the page, so that names inside two drawings cannot meet."""
    data = base64.b64encode(figure.svg.encode()).decode()
    caption = escape(figure.caption)
    image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _exchanges(block: Exchanges) -> str:
    inside = "\n".join(_exchange(item) for item in block.items)
    if block.folded:
        return f"<details><summary>{escape(block.folded)}</summary>\n{inside}\n</details>"
    return inside


def _exchange(exchange: Exchange) -> str:
    title = f'<div class="title">{escape(exchange.title)}</div>' if exchange.title else ""
    prompt = f'<div class="prompt">{escape(exchange.prompt)}{" …" if exchange.continued else ""}</div>'
    answers = "".join(_answer(answer) for answer in exchange.answers)
    return f'<div class="exchange">{title}{prompt}{answers}</div>'


def _answer(answer: Answer) -> str:
    mark = ""
    if answer.right is not None:
        mark = ' <span class="right">✓</span>' if answer.right else ' <span class="wrong">✗</span>'
    shown = {
        "text": "{}",
        "python": '<span class="tool">{}</span>',
        "python_output": '<span class="tool output">{}</span>',
    }
    text = "".join(shown[part.kind].format(escape(part.text)) for part in answer.parts)
    return (
        f'<div class="answer"><div class="who">{escape(answer.stage)}{mark}</div><div class="text">{text}</div></div>'
    )


RENDER: dict[type[Block], Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Notices: _notices,
    Table: _table,
    Figure: _figure,
    Exchanges: _exchanges,
}
