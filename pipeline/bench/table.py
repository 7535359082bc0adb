"""A measurement as lines of text: a line a case, a column a quantity."""

from collections.abc import Mapping
from typing import Any


def lines(result: Mapping[str, Any]) -> list[str]:
    """{case: {quantity: value}} in aligned columns; quantities of several levels are named with dots."""
    flat = {case: flatten(values) if isinstance(values, Mapping) else {"": values} for case, values in result.items()}
    columns = list(dict.fromkeys(name for values in flat.values() for name in values))
    if len(columns) > WIDE and len(flat) < len(columns):
        return _upright(flat, columns)
    head = ["", *columns]
    body = [[case, *(show(values.get(name)) for name in columns)] for case, values in flat.items()]
    return _align([head, *body])


WIDE = 8  # columns; a table with more is turned, with a line a quantity


def _upright(flat: Mapping[str, Mapping[str, Any]], columns: list[str]) -> list[str]:
    return _align([["", *flat], *([name, *(show(values.get(name)) for values in flat.values())] for name in columns)])


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{path}.{name}" if path else str(name)
        found |= flatten(value, dotted) if isinstance(value, Mapping) else {dotted: value}
    return found


def show(value: Any) -> str:
    """Four digits are what a measurement is good for."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(show, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
