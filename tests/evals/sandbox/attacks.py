"""The attacks in attacks.txt, and the check that judges them."""

from pathlib import Path

MARK = "5550157"  # in the check and nowhere else: a program that can name it has read the check
CHECK = f"""
def check(candidate):
    assert candidate(2, 3) == 5
    assert abs(candidate(2.5, 1) - 3.5) < 1e-6
    assert candidate({MARK}, 1) == {int(MARK) + 1}
    assert candidate([1], [2]) == [1, 2]
    assert candidate("a", "b") == "ab" and hash(candidate("a", "b")) == hash("ab")
    assert candidate(1, 1) is not True and not candidate(0, 0)
    assert sorted([candidate(1, 2), 2, 1]) == [1, 2, 3] and candidate(1, 2) in {{3}}
"""
RIGHT = "def add(a, b):\n    return a + b\n"


def _read() -> tuple[dict[str, str], dict[str, str]]:
    """(programs, shared beginnings), by name."""
    programs: dict[str, str] = {}
    shared: dict[str, str] = {}
    for section in Path(__file__).with_suffix(".txt").read_text().split("\n## ")[1:]:
        name, _, program = section.partition("\n")
        first, _, rest = program.partition("\n")
        if name.startswith("shared "):
            shared[name.removeprefix("shared ")] = program
        elif first.startswith("with "):
            programs[name] = shared[first.removeprefix("with ")] + rest
        else:
            programs[name] = program
    return programs, shared


ATTACKS, SHARED = _read()
_NAMES = list(ATTACKS)
_LOOKING, _ENDLESS = _NAMES.index("reading memory it has"), _NAMES.index("an endless loop")
LOOKING = _NAMES[_LOOKING:_ENDLESS]  # for the check, or for the judge
ENDLESS = ["keys that collide, sent", "all files closed, awake", *_NAMES[_ENDLESS:]]
