"""All measurements that need a GPU, in one command: agreement with the CPU, speed of training and decoding, memory.

Each part is a measurement in a process of its own, so that a crash or an out-of-memory error affects that part alone,
and its result is saved when it ends. Parts run in order of importance. A part that is not expected to fit into the rest
of bench.budget_seconds is skipped and named; one that takes too long is killed, and what it had saved is kept.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.durable import read_json
from pipeline.bench.jobs import MODERN
from pipeline.bench.registry import PREFIX, Bench, BenchSettings, Result, check_names
from pipeline.bench.tables import print_table
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.runner.launch import environment

OWN = ("out", "budget_seconds", "parts")  # settings that are not passed on to parts
POLL_SECONDS = 0.1
PATIENCE = 3  # times the expected seconds of a part, so that one that hangs leaves time for others
TAIL_LINES = 12  # of the output of a part that failed
TINY_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Part:
    """seconds: expected on one H100, compiling included. alone: nothing else runs beside it, because it is timed."""

    measurement: str
    seconds: float
    words: str = ""  # settings
    alone: bool = True


def _train(seconds: float, job: str, words: str = "") -> Part:
    return Part("train_step", seconds, f"bench.repeats=2 bench.jobs=[{job}] {words}")  # a step of d20 takes seconds


FP8 = "pretrain.params.fp8=true"
PARTS = {
    "equal_steps": Part("equal_steps", 60, alone=False),
    "equal_attention": Part("equal_attention", 60, alone=False),
    "equal_graphs": Part("equal_graphs", 60, alone=False),
    "equal_fp8": Part("equal_fp8", 60, alone=False),
    "equal_compiled": Part("equal_compiled", 90, alone=False),
    "d20 base bf16": _train(120, "d20"),
    "decode d20": Part("decode", 60, "bench.models=[d20] bench.batches=[1,16,256]"),
    "d32 memory": Part("fit", 120, "bench.repeats=2"),
    "d20 modern bf16": _train(130, "d20", MODERN),
    "d20 base fp8": _train(120, "d20", FP8),
    "d12 base bf16": _train(60, "d12"),
    "d20 modern fp8": _train(130, "d20", f"{MODERN} {FP8}"),
    "d12 modern bf16": _train(70, "d12", MODERN),
    "d12 base fp8": _train(60, "d12", FP8),
    "d12 modern fp8": _train(70, "d12", f"{MODERN} {FP8}"),
}
# Numbers that an H200 should reach, by part, case and quantity; missing one is not a failure.
BARS: dict[str, dict[str, dict[str, float]]] = {
    "d20 base bf16": {"d20 compiled": {"tok_s": 150_000, "mfu": 0.53}},
    "decode d20": {
        "d20 batch 1": {"tok_s": 1_200},
        "d20 batch 16": {"tok_s": 12_000},
        "d20 batch 256": {"tok_s": 35_000},
    },
}
SHOWN = ("error", "tok_s", "mfu", "micro_batch_rows", "of_bandwidth", "of_bound", "fits", "allocated_gb")
REASONS = ("skipped", "failed")


def check(bench: Bench) -> None:
    """Raises UserError for an unknown part, and without a GPU unless bench.tiny."""
    check_names(bench.settings.parts or [], PARTS, "bench.parts")
    if bench.device.type != "cuda" and not bench.settings.tiny:
        raise UserError("torch finds no GPU here", "bench gpu", "Set bench.tiny=true for a trial on the CPU.")


def gpu(bench: Bench) -> Result:
    """By part: seconds, and the results of its measurement."""
    settings = bench.settings
    result: Result = {}
    queue, running = deque(settings.parts or PARTS), list[Child]()
    end = time.monotonic() + settings.budget_seconds
    # An exception, so that the parts are killed, too: they are in process groups of their own.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder:
        try:
            while queue or running:
                while queue and may_start(PARTS[queue[0]], [PARTS[child.name] for child in running]):
                    name = queue.popleft()
                    needed, left = PARTS[name].seconds, max(0.0, end - time.monotonic())
                    if settings.tiny:
                        needed = min(needed, TINY_SECONDS)
                    if needed > left:
                        why = f"expected to take {needed:.0f} s, and {left:.0f} s are left"
                        result[name] = {"skipped": {"why": why, "needed_seconds": needed}}
                        bench.save(result)
                        bench.say(f"  {name}: skipped, {why}")
                    else:
                        running.append(Child(bench, name, Path(folder), min(left, PATIENCE * needed)))
                for child in [child for child in running if child.ended()]:
                    running.remove(child)
                    found = result[child.name] = child.result()
                    bench.save(result)
                    bench.say(f"  {child.name} ({found['seconds']:.0f} s)")
                    print_table({case: values for case, values in found.items() if case != "seconds"}, indent=4)
                time.sleep(POLL_SECONDS)
        finally:
            for child in running:
                child.kill()
            signal.signal(signal.SIGTERM, before)
    return result


def may_start(part: Part, running: list[Part]) -> bool:
    return not running or not any(other.alone for other in [part, *running])


class Child:
    """A part at work, in a process group of its own. limit: seconds after which it is killed."""

    def __init__(self, bench: Bench, name: str, folder: Path, limit: float) -> None:
        self.name, self.limit, self.started, self.late = name, limit, time.monotonic(), False
        self.out, self.log = folder / f"{name}.json", folder / f"{name}.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command(bench, PARTS[name], self.out),
                env=environment(False, Launch(threads=bench.settings.threads)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Return True if it has ended; kill it if its time is over."""
        if self.process.poll() is None and time.monotonic() - self.started > self.limit:
            self.late = True
            self.kill()
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kill it, the compiler's helper processes included."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """The result that was saved last, with what failed after that."""
        seconds, code = time.monotonic() - self.started, self.process.returncode
        found = (read_json(self.out, dict) or {}).get(PARTS[self.name].measurement, {})
        for case, bars in BARS.get(self.name, {}).items():
            if case in found:
                found[case] |= {f"{quantity}_bar": bar for quantity, bar in bars.items()}
        why = ""
        if self.late:
            why = f"ended after {self.limit:.0f} s, the longest it may take within bench.budget_seconds"
        elif code < 0:
            why = f"ended by {signal.Signals(-code).name}"
        elif code not in (0, 1) or not self.out.exists():
            why = f"ended with exit code {code}"
        if why:
            found.setdefault("failed", {"error": why})
        if "failed" in found:
            found["failed"]["output"] = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return {"seconds": seconds} | found


def command(bench: Bench, part: Part, out: Path) -> list[str]:
    """The part's own settings, then the user's, which take precedence."""
    usual, given = vars(BenchSettings()), vars(bench.settings)
    passed = {name: value for name, value in given.items() if name not in OWN and value != usual[name]}
    users = [f"{PREFIX}{name}={json.dumps(value)}" for name, value in passed.items()]
    line = [sys.executable, "-m", "pipeline.bench", part.measurement]
    return [*line, *part.words.split(), *users, *bench.overrides, f"{PREFIX}out={out}"]


def print_summary(result: Result) -> None:
    """Print each number that matters beside the bar or bound that it is compared with."""
    print_table(summary(result))
    late = [name for name, found in result.items() if "needed_seconds" in found.get("skipped", {})]
    if late:
        print(f"  No time was left for some parts. Run them with 'bench.parts=[{','.join(late)}]'.")


def summary(result: Result) -> Result:
    """Of cases within their bounds only the worst is kept."""
    rows: Result = {}
    if any(reason in result for reason in REASONS):
        return result
    for name, found in result.items():
        cases = {case: values for case, values in found.items() if case != "seconds"}
        equal = [case for case, values in cases.items() if values.get("within")]
        worst = max(equal, key=lambda case: cases[case]["error"] / (cases[case]["bound"] or 1.0), default=None)
        for case, values in cases.items():
            if case in REASONS:
                rows[name] = {"measured": f"{case}: {next(iter(values.values()))}"}
            elif reason := next((reason for reason in REASONS if reason in values), None):
                rows[f"{name}: {case}"] = {"measured": f"{reason}: {values[reason]}"}
            elif case not in equal or case == worst:
                bars = {quantity: values.get(f"{quantity}_bar") for quantity in SHOWN} | {"error": values.get("bound")}
                for quantity in [quantity for quantity in SHOWN if quantity in values]:
                    rows[f"{name}: {case} {quantity}"] = {"measured": values[quantity], "bar": bars[quantity]}
    return rows
