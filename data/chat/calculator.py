"""The calculator that a model can call: evaluates one Python expression, returns its value as text.

Arithmetic on numbers, comparisons, `len` and `str.count` of string literals; nothing else can be reached. Work is
bounded by size (of the text, of the tree, of every intermediate number) rather than by a clock, so that an answer never
depends on the machine's speed and the calculator runs in any thread.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_LENGTH = 512  # characters of an expression
MAX_DEPTH = 100  # of nested operations
MAX_BITS = 1024  # of an intermediate whole number; floats end at about the same size

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LITERAL = re.compile(r"'[^']*'|\"[^\"]*\"")
_WARNED = re.compile(r"[0-9a-fA-FjJ_.](?:and|else|for|if|in|is|or|not)")  # of 1if the parser says that it is no number
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class _Refused(Exception):
    """The expression is not one that the calculator evaluates."""


def calculate(expression: str) -> str | None:
    """The expression's value as text, see shown(); None for anything that it does not evaluate.

    Thousands separators (1,000) are accepted in expressions without string literals.
    """
    expression = expression.strip()
    # Python's parser may warn on stderr about escapes, which need a backslash, and about a number before a keyword.
    if len(expression) > MAX_LENGTH or "\\" in expression or _WARNED.search(_LITERAL.sub("''", expression)):
        return None
    if "'" not in expression and '"' not in expression:
        expression = _THOUSANDS.sub("", expression)
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body, MAX_DEPTH)
    except (_Refused, ArithmeticError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return None if isinstance(value, str) else shown(value)


def shown(value: int | float) -> str:
    """As GSM8K writes the results of its calls (27,175 of 27,998 are identical): 48/2 is 24, 70*.01*90 is 63.

    Whole numbers without a point, others with at most twelve digits; True and False by name.
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else format(value, ".12g")
    return str(value)


def _evaluate(node: ast.expr, depth: int) -> int | float | str:
    if depth == 0:
        raise _Refused
    if isinstance(node, ast.Constant):
        return _checked(node.value if not isinstance(node.value, bool) else None)
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, depth), _number(node.right, depth)
        _bound(node.op, left, right)
        return _checked(_BINARY[_known(node.op, _BINARY)](left, right))
    if isinstance(node, ast.UnaryOp):
        return _checked(_UNARY[_known(node.op, _UNARY)](_number(node.operand, depth)))
    if isinstance(node, ast.Compare):
        return _compare(node, depth)
    if isinstance(node, ast.Call):
        return _call(node, depth)
    raise _Refused


def _compare(node: ast.Compare, depth: int) -> bool:
    """Evaluates all operands first, so that a chain that is false early is still refused for a later operand."""
    values = [_evaluate(item, depth - 1) for item in (node.left, *node.comparators)]
    tests = [_COMPARE[_known(op, _COMPARE)] for op in node.ops]
    return all(test(a, b) for test, a, b in zip(tests, values, values[1:], strict=False))


def _call(node: ast.Call, depth: int) -> int:
    """len(TEXT) or TEXT.count(TEXT); anything else is refused."""
    if node.keywords or len(node.args) != 1:
        raise _Refused
    argument = _evaluate(node.args[0], depth - 1)
    if not isinstance(argument, str):
        raise _Refused
    if isinstance(node.func, ast.Name) and node.func.id == "len":
        return len(argument)
    if isinstance(node.func, ast.Attribute) and node.func.attr == "count":
        text = _evaluate(node.func.value, depth - 1)
        if isinstance(text, str):
            return text.count(argument)
    raise _Refused


def _number(node: ast.expr, depth: int) -> int | float:
    value = _evaluate(node, depth - 1)
    if isinstance(value, str):
        raise _Refused
    return value


def _bound(op: ast.operator, left: int | float, right: int | float) -> None:
    """Refuse a power of whole numbers that would be too large, before computing it."""
    if not isinstance(op, ast.Pow) or isinstance(left, float) or isinstance(right, float):
        return
    # 0, 1 and -1 stay small whatever the power.
    if abs(left) > 1 and left.bit_length() * right > MAX_BITS:
        raise _Refused


def _checked(value: object) -> int | float | str:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _Refused


def _known(op: ast.AST, table: dict[type, Any]) -> type:
    if type(op) not in table:
        raise _Refused
    return type(op)
