"""What data/ raises when what it was given cannot be used; shown as one line, without a traceback."""

RESULT_NEUTRAL = "only says what went wrong"


class DataError(Exception):
    """Something is wrong with the data itself; the message says what, where and what to do."""

    cause = "data"


class DiskFull(DataError):
    """There is no room for what was asked."""

    cause = "disk"
