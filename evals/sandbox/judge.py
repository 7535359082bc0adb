"""The process that decides the verdict: it runs the check, and asks the answer's process for each value.

It executes the data set's code and never the model's. Results of the answer arrive as copies of built-in types, and so
do the arguments there: a check cannot see that an argument was changed in place.
"""

import builtins
from collections.abc import Callable
from typing import Any

from evals.sandbox import wire


class AnswerError(Exception):
    """The answer raised an exception that is not built in."""


class Left(BaseException):
    """The answer raised SystemExit or similar, which no check is meant to catch."""


def main(cases: int, questions: int, replies: int, verdicts: int) -> None:
    wire.send(verdicts, verdict(wire.receive(cases), Answer(questions, replies)))


def verdict(case: dict[str, Any], answer: "Answer") -> tuple[str, str]:
    """(status, detail); status "lost" if the answer's process is gone: its exit status has the reason.

    case: "program" is the answer's source; "check" is source that defines check(candidate), "function" the name to
    call. Without a check, a program passes if it reports that it has reached its end.
    """
    try:
        answer.ask(program=case["program"])
        if case["check"] is not None:
            candidate = answer.function(case["function"])
            # The source may refer to the function by its own name.
            namespace: dict[str, Any] = {"__name__": "check"}
            exec(compile(case["check"], "check.py", "exec"), namespace)
            namespace[case["function"]] = candidate
            namespace["check"](candidate)
        if answer.over is not None:  # a check with a bare except has caught it
            raise answer.over
    except wire.Lost:
        return "lost", ""
    except MemoryError:
        return "memory", ""
    except (AnswerError, Left, wire.NotPlain) as error:
        return "failed", str(error)[:500]
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"[:500]
    return "passed", ""


class Answer:
    """The other process, through two pipes. After its first malformed reply it is not asked again."""

    def __init__(self, questions: int, replies: int) -> None:
        self.questions, self.replies = questions, replies
        self.over: BaseException | None = None

    def function(self, name: str) -> Callable[..., Any]:
        """A proxy for a function of the answer."""

        def candidate(*args: Any, **kwargs: Any) -> Any:
            return self.ask(call=name, args=wire.pack(list(args)), kwargs=wire.pack(kwargs))

        return candidate

    def ask(self, **question: Any) -> Any:
        """The value that the answer returns; raises what it raised."""
        if self.over is not None:
            raise self.over
        try:
            wire.send(self.questions, question)
            return self._value(wire.receive(self.replies, wire.REPLY_BYTES))
        except (wire.Lost, wire.NotPlain, Left) as error:
            self.over = error
            raise

    def _value(self, reply: Any) -> Any:
        match reply:
            case {"value": value}:
                return wire.unpack(value)
            case {"raised": str(name), "args": list(args)}:
                raise _exception(name, [wire.unpack(argument) for argument in args])
            case {"not_plain": str(detail)}:
                raise wire.NotPlain(detail[:500])
        raise wire.NotPlain("a message is malformed")


def _exception(name: str, args: list[Any]) -> BaseException:
    """The built-in exception of that name, so that a check can expect it; AnswerError if there is none."""
    if name == "SystemExit":
        return Left(f"exit {args[0] if args else None}"[:500])
    kind = vars(builtins).get(name)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        return AnswerError(f"{name}: {args[0] if args else ''}"[:500])
    if not issubclass(kind, Exception):
        return Left(name)
    try:
        return kind(*args)
    except Exception:  # some want arguments of certain types
        return AnswerError(name)
