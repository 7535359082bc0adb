"""A stage without inputs: writes `n` numbers, one at a time."""

from dataclasses import dataclass, field

from pipeline.job import Job, Stopped


@dataclass
class Params:
    n: int = 3
    fail_at: int | None = None
    gate: str | None = field(default=None, metadata={"file": True})


def main(job: Job[Params]) -> dict[str, int]:
    path = job.out / "numbers.txt"
    done = len(path.read_text().split()) if path.exists() else 0
    for i in range(done, job.params.n):
        if job.should_stop:
            raise Stopped(f"{i} of {job.params.n} numbers are written")
        if job.params.fail_at == i:
            raise RuntimeError(f"number {i} cannot be written")
        with open(path, "a") as file:
            file.write(f"{i}\n")
        job.log(i, value=i)
        job.progress(i + 1, job.params.n, "numbers")
    return {"numbers": job.params.n, "resumed_at": done}
