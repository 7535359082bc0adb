"""The confined process that runs the model's program. It is not trusted, since the program can change all of it.

It receives the program and the arguments of each call, but never the check or the expected results.
"""

import os
import sys
from typing import Any

from evals.sandbox import wire


def main(questions: int, replies: int) -> None:
    """Run the program and then its functions, as the judge asks, until the pipe is closed. Does not return."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        while True:
            wire.write(replies, _reply(wire.receive(questions), namespace))
    except wire.Lost:
        os._exit(0)


def _reply(question: dict[str, Any], namespace: dict[str, Any]) -> bytes:
    try:
        value = _obey(question, namespace)
        sys.stdout.flush()  # this process is killed once the judge knows enough
        sys.stderr.flush()
        return wire.encode({"value": wire.pack(value)}, wire.REPLY_BYTES)
    except wire.NotPlain as error:
        return wire.encode({"not_plain": str(error)[:500]})
    except BaseException as error:
        return _raised(error)


def _obey(question: dict[str, Any], namespace: dict[str, Any]) -> Any:
    if "program" in question:
        exec(compile(question["program"], "program.py", "exec"), namespace)
        return None
    name = question["call"]
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name](*wire.unpack(question["args"]), **wire.unpack(question["kwargs"]))


def _raised(error: BaseException) -> bytes:
    named = {"raised": type(error).__name__}
    try:
        return wire.encode(named | {"args": wire.pack(list(error.args))}, wire.REPLY_BYTES)
    except wire.NotPlain:
        return wire.encode(named | {"args": [str(error)[:500]]})
