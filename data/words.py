"""English words for the spelling tasks: a word list, or those that Python's own library is written in."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

from data.draw import held_out
from data.errors import DataError

_WORD = re.compile(r"(?<![\w.'\"-])[a-z]+(?=,?[ \n]|\.\s)")  # not part of a name, a call or a quotation
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def split_words(split: str, folder: Path | None, shortest: int, longest: int) -> list[str]:
    """The words of one split, sorted; what is held out for "test" is in no other split.

    folder: holds the word list (a .txt file with a word a line); None takes the words of Python's standard
    library, which differ a little between Python versions.
    """
    words = _from_list(folder) if folder else python_words()
    kept = sorted({word for word in words if shortest <= len(word) <= longest})
    chosen = [word for word in kept if held_out_word(word) == (split == "test")]
    if not chosen:
        raise DataError(f"{folder or 'Python library'}: no words of {shortest} to {longest} letters for {split}")
    return chosen


def held_out_word(word: str) -> bool:
    """Whether a word is for evaluation only, in every task that spells."""
    return held_out(f"word {word}")


def _from_list(folder: Path) -> list[str]:
    paths = [path for path in sorted(folder.glob("**/*.txt")) if path.name != "log.txt"]  # the log of the download
    if len(paths) != 1:
        raise DataError(f"{folder}: a word list is one .txt file, but there are {len(paths)}")
    return [word for word in paths[0].read_text(encoding="utf-8").split() if word.isascii() and word.islower()]


def python_words() -> list[str]:
    """Words written in at least two modules of the standard library; in one alone many are abbreviations."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: Counter[str] = Counter()
    for path in [*library.glob("*.py"), *library.glob("*/*.py"), *library.glob("*/*/*.py")]:
        if _NOT_PROSE.isdisjoint(path.relative_to(library).parts):
            seen.update(set(_WORD.findall(path.read_text(encoding="utf-8", errors="ignore"))))
    return [word for word, files in seen.items() if files > 1]
