"""Plain values from YAML or JSON into dataclasses, strictly: the wrong type or an unknown name is the user's error."""

import dataclasses
import math
import types
import typing
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from data.errors import did_you_mean
from model.checks import From, ZeroIsOff
from pipeline.config import renamed
from pipeline.errors import FOR_USERS, UserError

T = TypeVar("T")

LONGEST_SHOWN = 200  # characters of a value in a message


def build(cls: type[T], plain: Any, where: str = "") -> T:
    """An instance of dataclass `cls` from a mapping; nested dataclasses, lists, dicts, unions and Literals included.

    Raises UserError with the dotted path of the wrong value and, for an unknown name, the nearest right ones.
    """
    if not isinstance(plain, dict):
        raise UserError(f"is {_show(plain)}, but a group of settings is needed", where)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in plain:
        if name not in fields:
            raise unknown(str(name), list(fields), where)
    values = {name: convert(hints[name], plain[name], join(where, name)) for name in fields if name in plain}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"needs a value for {', '.join(missing)}", where)
    try:
        return cls(**values)
    except FOR_USERS as error:
        if error.cause != "config":
            raise
        raise UserError(str(error), where) from None


def unknown(name: str, known: list[str], where: str) -> UserError:
    """The error for a name that is none of the known ones, with the nearest of them."""
    otherwise = f"Known here: {', '.join(sorted(known)) or 'nothing'}."
    fix = did_you_mean(name, known, otherwise, join(where, ""))
    return UserError(f"there is no setting {join(where, name)}", fix=renamed.hint(join(where, name)) or fix)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names; UserError when it is not one and cannot become one without loss."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _convert_bounded(hint, value, where)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise UserError(f"is {_show(value)}", where, f"It must be one of {', '.join(map(str, get_args(hint)))}.")
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            example = f"{where}=[{value}]" if isinstance(value, str) else "NAME=[a,b]"
            raise UserError(f"is {_show(value)}, but a list is needed", where, f"Lists are written '{example}'.")
        item = (get_args(hint) or (Any,))[0]
        items = [convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"is {_show(value)}, but a group of settings is needed", where)
        item = (get_args(hint) or (str, Any))[1]
        return {str(k): convert(item, v, join(where, str(k))) for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            value = float(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
        raise UserError(f"is {_show(value)}, but a finite number is needed", where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    raise UserError(f"is {_show(value)}, but {_name(hint)} is needed", where)


def _convert_bounded(hint: Any, value: Any, where: str) -> Any:
    base, *limits = get_args(hint)
    if any(isinstance(limit, ZeroIsOff) for limit in limits):
        return None if value == 0 and not isinstance(value, bool) else convert(base, value, where)
    number = convert(base, value, where)
    if not all(limit.holds(number) for limit in limits):
        raise UserError(f"is {_show(value)}, but {_name(hint)} is needed", where)
    return number


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    concrete = [option for option in options if option is not type(None)]
    exact = [option for option in concrete if isinstance(option, type) and type(value) is option]
    last: UserError | None = None
    for option in exact or concrete:
        try:
            return convert(option, value, where)
        except UserError as error:
            last = error
    if len(concrete) == 1 and last:
        raise last
    wanted = " or ".join(_name(option) for option in concrete)
    raise UserError(f"is {_show(value)}, but {wanted} is needed", where)


def _name(hint: Any) -> str:
    """What a value should be, in words."""
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        return " ".join([_name(base), *(str(limit) for limit in limits if isinstance(limit, From))])
    return _NAMES.get(hint) or " | ".join(map(str, get_args(hint))) or str(hint)


def join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
