"""Errors of data/: each is shown to the user as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """Something is wrong with the data itself. The message says what, where, and what to do.

    It is one line without control characters, whatever foreign names or answers it quotes.
    """

    cause = "data"

    def __init__(self, message: str):
        from data.trust import printable  # which raises these errors

        super().__init__(printable(message, keep=""))


class DataMistake(DataError):
    """The user asked for or provided something that cannot be used: a wrong path, an invalid conversation."""

    cause = "config"


class DiskFull(DataError):
    """There is not enough room on the disk."""

    cause = "disk"


class HelperDied(DataError):
    """A helper process was killed from outside."""

    cause = "oom"


def did_you_mean(name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """Advice on an unknown name: the nearest known ones, each after `prefix`, or else `otherwise`."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"Did you mean {' or '.join(prefix + other for other in near)}?" if near else otherwise
