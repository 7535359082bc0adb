"""A stage without inputs: writes the numbers from 0 to `n` - 1, one at a time, and goes on where it was cut off."""

import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.job import Job, Stopped


@dataclass
class Params:
    n: int = 3
    fail_at: int | None = None  # raise before this number
    pause_at: int | None = None  # wait before this number until the file `gate` exists
    gate: str = ""
    deaf: bool = False  # do not hear that it is asked to stop while it waits


def main(job: Job[Params]) -> dict[str, int]:
    path = job.out / "numbers.txt"
    done = len(path.read_text().split()) if path.exists() else 0
    job.rewind(done - 1)
    for i in range(done, job.params.n):
        if job.params.fail_at == i:
            raise RuntimeError(f"number {i} cannot be written")
        while job.params.pause_at == i and not Path(job.params.gate).exists():
            if job.should_stop and not job.params.deaf:
                break
            job.progress(i, job.params.n, "numbers")
            time.sleep(0.02)
        if job.should_stop:
            raise Stopped(f"{i} of {job.params.n} numbers are written")
        with open(path, "a") as file:
            file.write(f"{i}\n")
        job.log(i, value=i)
        job.progress(i + 1, job.params.n, "numbers")
    print(f"{job.params.n} numbers are written")
    return {"numbers": job.params.n, "resumed_at": done}
