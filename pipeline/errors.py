"""Errors of pipeline/: each tells the user what is wrong and what to do.

`cause` is one of oom, nan, disk, data, config, peer_lost, preempted and unknown: it decides what happens next.
"""

from data.errors import DataError
from model.errors import ModelError


class PipelineError(Exception):
    """Base of the errors below."""

    cause = "unknown"


# Meant for the user: the message is shown as it is, without a traceback.
FOR_USERS = (PipelineError, DataError, ModelError)


class UserError(PipelineError):
    """A mistake the user can correct: what is wrong, where it came from (file and key), what to do. Exit code 2."""

    cause = "config"

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(". ".join(part for part in (f"{where}: {what}" if where else what, fix) if part))


class Guarded(PipelineError):
    """A run that stops before it starts because it would cost more than was allowed. Exit code 3."""

    cause = "config"


class Corrupt(PipelineError):
    """A stored file that is not what its manifest says: what is wrong, what to do. Exit code 1."""

    cause = "data"

    def __init__(self, what: str, fix: str = ""):
        self.what = what
        super().__init__(". ".join(part for part in (what, fix) if part))


class StageFailed(PipelineError):
    """A stage that ended without its artifact. Exit code 1."""

    def __init__(self, stage: str, cause: str, message: str, log: str = ""):
        self.stage, self.cause, self.message, self.log = stage, cause, message, log
        super().__init__(f"{stage} failed ({cause}): {message}" + (f"\n  log: {log}" if log else ""))


class Unreachable(PipelineError):
    """A service that the user has configured does not answer. Exit code 1."""


class Interrupted(PipelineError):
    """The run was asked to stop and did. Exit code 130."""

    cause = "preempted"
