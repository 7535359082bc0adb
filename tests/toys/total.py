"""A stage that adds up what its inputs wrote, with ranks."""

import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.job import Job, Launch

RANKS = True


@dataclass
class Params:
    scale: float = 1.0
    risky: bool = False  # adds nothing up unless launch.sandbox=weak
    gate: str = ""  # wait until this file exists


def lacks(metrics: dict[str, float], launch: Launch) -> str:
    return "weak adds it up" if metrics.get("refused") and launch.sandbox == "weak" else ""


def main(job: Job[Params]) -> dict[str, float]:
    while job.params.gate and not Path(job.params.gate).exists():
        job.progress(2, 3, "numbers")
        time.sleep(0.02)
    refused = job.params.risky and job.launch.sandbox == "strict"
    total = (
        0
        if refused
        else sum(int(n) for folder in job.inputs.values() for n in (folder / "numbers.txt").read_text().split())
    )
    if job.rank == 0:
        (job.out / "numbers.txt").write_text(f"{int(total * job.params.scale)}\n")
    return {"total": total * job.params.scale, "world_size": job.world_size, "refused": refused}
