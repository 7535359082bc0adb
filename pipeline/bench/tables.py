"""Prints a measurement as a table that fits the terminal."""

import json
from collections.abc import Mapping
from typing import Any


def print_table(result: Mapping[str, Any], indent: int = 2) -> None:
    """Print {case: {quantity: value}} with a row per case, or with a row per quantity where that is too wide.

    Quantities of several levels are named with dots. Without rich, as on a bare GPU machine, the result is printed as
    JSON.
    """
    try:
        from rich.padding import Padding
        from rich.table import Table

        from pipeline.printing import PlainConsole
    except ImportError:
        print(json.dumps(result, indent=2))
        return
    cases = {case: flatten(values) if isinstance(values, Mapping) else {"": values} for case, values in result.items()}
    columns = list(dict.fromkeys(name for values in cases.values() for name in values))
    by_case: list[Any] = [
        ["", *columns],
        *([case, *(values.get(name) for name in columns)] for case, values in cases.items()),
    ]
    console = PlainConsole()
    unlimited = console.options.update(max_width=10_000)
    tables = {}  # by width
    for rows in ([*zip(*by_case)], by_case):
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
        for number, name in enumerate(rows[0]):
            table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number == 0)
        for row in rows[1:]:
            table.add_row(*map(as_text, row))
        tables[max(console.width, console.measure(table, options=unlimited).maximum + indent)] = table
    console.print(Padding.indent(tables[min(tables)], indent))


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found


def as_text(value: Any) -> str:
    """Numbers with four digits: the others are noise."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(as_text, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
