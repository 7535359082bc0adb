"""Words from the source of Python's standard library, as a data set for the spelling tasks; needs no network."""

import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

from data.sources import pydocs
from data.sources.source import Made, Request

_WORD = re.compile(r"(?<![\w.'\"-])[a-z]+(?=,?[ \n]|\.\s)")  # not part of a name, a call or a quotation
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any]:
    """As pydocs.identity: the words depend on this Python installation."""
    return pydocs.identity(params, memory, online)


def make(request: Request) -> Made:
    """Write words.txt, one word per line, sorted."""
    (request.out / "words.txt").write_text("".join(word + "\n" for word in sorted(python_words())), encoding="utf-8")
    return Made(["words.txt"])


def python_words() -> list[str]:
    """Words that occur in two modules of the standard library or more; many that occur in one are abbreviations."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: Counter[str] = Counter()
    for path in [*library.glob("*.py"), *library.glob("*/*.py"), *library.glob("*/*/*.py")]:
        if _NOT_PROSE.isdisjoint(path.relative_to(library).parts):
            seen.update(set(_WORD.findall(path.read_text(encoding="utf-8", errors="ignore"))))
    return [word for word, files in seen.items() if files > 1]
