"""What model/ raises for a mistake that a person can fix; each is shown as one line, without a traceback."""


class ModelError(ValueError):
    """A setting or a file that cannot work; the message says what, where and what to do."""

    cause = "config"


class Diverged(ModelError):
    """The loss became NaN or infinite."""

    cause = "nan"
