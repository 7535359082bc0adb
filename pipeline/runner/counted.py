"""How much of a stage's work is done, for those that only count."""

from dataclasses import dataclass
from typing import Any

from pipeline.job import Job, Stopped


@dataclass
class Counted:
    """saying: what Stopped says when the stage is asked to stop, which add() is how it notices."""

    job: Job[Any]
    total: int
    unit: str
    saying: str
    done: int = 0

    def add(self, count: int, **shown: Any) -> None:
        """Raises Stopped. More than `total` counts as all: totals are often estimates."""
        self.done += count
        self.job.progress(min(self.done, self.total), self.total, self.unit, **shown)
        if self.job.should_stop:
            raise Stopped(self.saying)
