"""A check sees of an answer what it would see in its own interpreter, as far as that is plain values."""

import pytest

from data.tasks.task import Check
from evals.sandbox.box import Limits, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Limits(memory_bytes=256 << 20), "weak")


def judged(sandbox, program: str, *lines: str, before: str = ""):
    """How `program`, which defines f, does in a check of these lines."""
    return sandbox(
        program, Check(before + "\ndef check(candidate):\n" + "".join(f"    {line}\n" for line in lines), "f")
    )


RAISES = """
class Odd(Exception): pass
def f(what):
    raise {"value": ValueError("bad", 3), "key": KeyError("k"), "odd": Odd("hm"),
           "text": UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), "file": FileNotFoundError(2, "gone")}[what]
"""


def test_an_exception_that_the_check_expects_is_the_one_that_was_raised(sandbox):
    lines = [
        "for what, kind in (('value', ValueError), ('key', KeyError), ('file', FileNotFoundError),",
        "                   ('text', UnicodeDecodeError), ('odd', Exception)):",
        "    try: candidate(what)",
        "    except kind as error: made = type(error), error.args",
        "    else: raise SystemExit",
        "    assert what != 'value' or made == (ValueError, ('bad', 3))",
    ]
    assert judged(sandbox, RAISES, *lines).passed
    assert judged(sandbox, RAISES, "candidate('odd')").detail == "Odd: hm"
    assert judged(sandbox, RAISES, "candidate('value')").detail == "ValueError: ('bad', 3)"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("def f(): raise SystemExit(3)", "exit 3"),
        ("def f(): raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): return f", "a function is not a plain value"),
        ("import os\ndef f(): os._exit(7)", "left with exit code 7"),
    ],
)
@pytest.mark.parametrize("clause", ["except Exception", "except BaseException", "except"])
def test_an_answer_that_is_over_fails_a_check_that_catches_everything(sandbox, program, detail, clause):
    result = judged(sandbox, program, "try: candidate()", f"{clause}: pass")

    assert result.status == "failed" and detail in result.detail


def test_arguments_of_any_plain_kind_and_by_name_reach_the_function(sandbox):
    program = "def f(*given, **named): return given, named"
    lines = ["given = (1, 'a', [2.5, None], {3: (4,)}, {5}, b'6', float('inf'))"]
    lines += ["assert candidate(*given, by=[7]) == (given, {'by': [7]})", "assert candidate() == ((), {})"]

    assert judged(sandbox, program, *lines).passed


def test_an_argument_is_a_copy(sandbox):
    assert judged(sandbox, "def f(x): x.append(1)", "x = []", "candidate(x)", "assert x == []").passed


def test_an_answer_remembers_between_calls(sandbox):
    program = "made = []\ndef f():\n    made.append(1)\n    return len(made)"

    assert judged(sandbox, program, "assert [candidate(), candidate()] == [1, 2]").passed


def test_the_check_has_its_own_helpers_and_may_call_the_function_by_its_name(sandbox):
    before = "def half(x): return x / 2\ndef f(x): pass"
    program = "def half(x): return 0\ndef f(x): return 2 * x"

    assert judged(sandbox, program, "assert half(f(candidate(1))) == 2.0", before=before).passed


def test_what_the_check_prints_is_not_shown_to_the_answer_or_as_its_output(sandbox):
    program = "import os\ndef f(): print(os.pread(1, 99, 0)); return 1"

    assert judged(sandbox, program, "print('expected')", "candidate()").output == "b''\n"


def test_an_error_in_the_check_itself_is_no_pass(sandbox):
    assert judged(sandbox, "def f(): pass", "raise SystemExit(0)").status == "failed"
    assert judged(sandbox, "def f(): pass", "import os", "os._exit(0)").detail == "left with exit code 0 in the check"
    assert sandbox("def f(): pass", Check("check = ", "f")).status == "failed"
    assert sandbox("def f(): pass", Check("", "f")).detail == "KeyError: 'check'"
