"""What saving a checkpoint costs a training that goes on meanwhile.

The job runs through model.training.trainer and saves once in its middle. Each step after that which is slower than the
median of those before it counts with the difference, until the files are written: copying the state to host memory,
which holds up training, and what writing beside it takes away. The share is of the time between two saves at
launch.save_minutes.
"""

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

from pipeline.bench import configs
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import Ceiling
from pipeline.bench.train_step import ways
from pipeline.bench.trainings import WARM_STEPS, StopWatch, Training, prepared, run_trainer

if TYPE_CHECKING:
    from model.training.checkpoint import Checkpointer


def measure(bench: Bench) -> Result:
    result: Result = {}
    for name in configs.names(bench):
        config = configs.compose(bench, configs.JOBS[name])
        before = max(3, bench.settings.repeats)
        launch = dataclasses.replace(config.launch, save_every=WARM_STEPS + before)
        config = dataclasses.replace(config, launch=launch)
        with prepared(bench, config, WARM_STEPS + 3 * before, ways(bench)[-1]) as training:
            result[name] = _save_once(training)
    return result


def _save_once(training: Training) -> dict[str, Any]:
    saved: dict[str, float] = {}
    saver = _saver(training, saved)
    watch = StopWatch(Ceiling(training.world.device, training.settings.dtype, tiny=True))
    run_trainer(training, watch, saver)
    assert training.settings.save_every
    first = training.settings.save_every - WARM_STEPS
    usual = statistics.median(watch.seconds[:first])
    lost = stall(watch.seconds[first:], usual, saved["copy_s"] + saved["write_s"])
    minutes = training.job.launch.save_minutes
    return {
        "step_ms": usual * 1e3,
        "mb": sum(p.stat().st_size for p in training.job.out.rglob("*.safetensors")) / 1e6,
        **saved,
        "stall_s": lost,
        "save_minutes": minutes,
        "share_of_time": lost / (minutes * 60) if minutes else 0.0,
    }


def stall(after: list[float], usual: float, until: float) -> float:
    """Seconds lost by the steps that begin within `until` seconds of the save."""
    lost = passed = 0.0
    for seconds in after:
        if passed > until:
            break
        passed += seconds
        lost += max(0.0, seconds - usual)
    return lost


def _saver(training: Training, saved: dict[str, float]) -> "Checkpointer":
    """Saves the first time it is asked to, and notes how long copying and writing took."""
    from model.training.checkpoint import Checkpointer, Keep

    class Once(Checkpointer):
        def save(self, *state: Any) -> None:
            if not saved:
                started = time.perf_counter()
                super().save(*state)
                saved["copy_s"] = time.perf_counter() - started

        def _write(self, *parts: Any) -> None:
            started = time.perf_counter()
            super()._write(*parts)
            saved["write_s"] = time.perf_counter() - started

    return Once(training.job.out / "checkpoints", training.world, training.job.key, Keep(), training.job.say)
