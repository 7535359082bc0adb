"""English words for the spelling tasks."""

from pathlib import Path

from data.errors import DataError
from data.tasks.draw import held_out
from data.tasks.task import TaskError


def split_words(split: str, folder: Path | None, shortest: int, longest: int) -> list[str]:
    """The words of one split, sorted; what is held out for "test" is in no other split.

    folder: holds the word list (a .txt file with a word a line).

    Raises TaskError without one, DataError when no word is left.
    """
    if folder is None:
        raise TaskError("spelling needs words: name a data set with a word list, as in dataset: python_words")
    kept = sorted({word for word in _from_list(folder) if shortest <= len(word) <= longest})
    chosen = [word for word in kept if held_out_word(word) == (split == "test")]
    if not chosen:
        raise DataError(f"{folder}: no words of {shortest} to {longest} letters for {split}")
    return chosen


def held_out_word(word: str) -> bool:
    """Whether a word is for evaluation only, in every task that spells."""
    return held_out(f"word {word}")


def _from_list(folder: Path) -> list[str]:
    paths = [path for path in sorted(folder.glob("**/*.txt")) if path.name != "log.txt"]  # the log of the download
    if len(paths) != 1:
        raise DataError(f"{folder}: a word list is one .txt file, but there are {len(paths)}")
    return [
        word
        for word in paths[0].read_text(encoding="utf-8", errors="replace").split()
        if word.isascii() and word.islower()
    ]
