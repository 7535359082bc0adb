"""What data/ raises when what it was given cannot be used; shown as one line, without a traceback."""


class DataError(Exception):
    """Something is wrong with the data itself; the message says what, where and what to do.

    It is one line without control characters, whatever names or answers from outside it quotes.
    """

    cause = "data"

    def __init__(self, message: str):
        from data.trust import printable  # which raises these

        super().__init__(printable(message, keep=""))


class DataMistake(DataError):
    """What the user asked for or gave cannot be used: a wrong path, a line that is no conversation."""

    cause = "config"


class DiskFull(DataError):
    """There is no room for what was asked."""

    cause = "disk"
