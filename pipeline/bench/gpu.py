"""All measurements that need a GPU, in one command: agreement with the CPU, speed of training and decoding, memory.

Each part is a measurement in a process of its own, so that a crash or an out-of-memory error ends that part alone, and
its result is saved as it ends. Parts run in order of importance. One that is not expected to fit into the rest of
bench.budget_seconds is skipped and named; one that takes too long is ended, and what it had saved is kept.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data.durable import read_json
from pipeline.bench import configs, table
from pipeline.bench.registry import Result
from pipeline.bench.settings import PREFIX, Bench, BenchSettings
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.runner.launch import environment
from pipeline.typed import unknown

OWN = ("out", "budget_seconds", "parts")  # settings that are not passed on to parts
POLL_SECONDS = 0.1
PATIENCE = 3  # times the expected seconds of a part, so that one that hangs leaves time for others
TAIL_LINES = 12  # of the output of a part that failed
TINY_SECONDS = 20.0


@dataclass(frozen=True)
class Part:
    """seconds: expected on one H100, compiling included. alone: nothing else runs beside it, as it is timed."""

    name: str
    measurement: str
    seconds: float
    words: str = ""  # settings
    alone: bool = True


TRAIN = "bench.repeats=2 bench.jobs"  # a step of d20 takes seconds
PARTS = [
    Part("equal_steps", "equal_steps", 60, alone=False),
    Part("equal_attention", "equal_attention", 60, alone=False),
    Part("equal_graphs", "equal_graphs", 60, alone=False),
    Part("equal_fp8", "equal_fp8", 60, alone=False),
    Part("equal_compiled", "equal_compiled", 90, alone=False),
    Part("d20 base bf16", "train_step", 120, f"{TRAIN}=[d20]"),
    Part("decode d20", "decode", 60, "bench.models=[d20] bench.batches=[1,16,256]"),
    Part("d32 memory", "fit", 120, "bench.repeats=2"),
    Part("d20 modern bf16", "train_step", 130, f"{TRAIN}=[d20] {configs.MODERN}"),
    Part("d20 base fp8", "train_step", 120, f"{TRAIN}=[d20] pretrain.params.fp8=true"),
    Part("d12 base bf16", "train_step", 60, f"{TRAIN}=[d12]"),
    Part("d20 modern fp8", "train_step", 130, f"{TRAIN}=[d20] {configs.MODERN} pretrain.params.fp8=true"),
    Part("d12 modern bf16", "train_step", 70, f"{TRAIN}=[d12] {configs.MODERN}"),
    Part("d12 base fp8", "train_step", 60, f"{TRAIN}=[d12] pretrain.params.fp8=true"),
    Part("d12 modern fp8", "train_step", 70, f"{TRAIN}=[d12] {configs.MODERN} pretrain.params.fp8=true"),
]
# Numbers that an H200 should reach, by part, case and quantity; to miss one is not a failure.
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
    chosen(bench.settings)
    if bench.device.type != "cuda" and not bench.settings.tiny:
        raise UserError("torch finds no GPU here", "bench gpu", "Set bench.tiny=true for a trial on the CPU.")


def measure(bench: Bench) -> Result:
    """By part: seconds, and what its measurement found."""
    settings = bench.settings
    result: Result = {}
    queue, running = deque(chosen(settings)), list[Child]()
    end = time.monotonic() + settings.budget_seconds
    with tempfile.TemporaryDirectory(prefix="chatmill-bench-") as folder, exit_on_sigterm():
        try:
            while queue or running:
                while queue and may_start(queue[0], running):
                    part = queue.popleft()
                    if (needed := expected(part, settings)) > (left := max(0.0, end - time.monotonic())):
                        why = f"expected to take {needed:.0f} s, and {left:.0f} s are left"
                        _ended(bench, result, part, {"skipped": {"why": why, "needed_seconds": needed}})
                    else:
                        running.append(Child(bench, part, Path(folder), min(left, PATIENCE * needed)))
                for child in [child for child in running if child.ended()]:
                    running.remove(child)
                    _ended(bench, result, child.part, child.result())
                time.sleep(POLL_SECONDS)
        finally:
            for child in running:
                child.kill()
    return result


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that ends the parts: they are in process groups of their own."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def chosen(settings: BenchSettings) -> list[Part]:
    """Raises UserError for an unknown part."""
    named = {part.name: part for part in PARTS}
    for name in settings.parts or []:
        if name not in named:
            raise unknown(name, list(named), "bench.parts")
    return [named[name] for name in settings.parts or named]


def expected(part: Part, settings: BenchSettings) -> float:
    return min(part.seconds, TINY_SECONDS) if settings.tiny else part.seconds


def may_start(part: Part, running: "list[Child]") -> bool:
    return not running or not (part.alone or any(child.part.alone for child in running))


def _ended(bench: Bench, result: Result, part: Part, found: dict[str, Any]) -> None:
    result[part.name] = found
    bench.save(result)
    if "skipped" in found:
        bench.say(f"  {part.name}: skipped, {found['skipped']['why']}")
        return
    bench.say(f"  {part.name} ({found['seconds']:.0f} s)")
    for line in table.lines({case: values for case, values in found.items() if isinstance(values, dict)}):
        bench.say("    " + line)


class Child:
    """A part at work, in a process group of its own. limit: seconds after which it is ended."""

    def __init__(self, bench: Bench, part: Part, folder: Path, limit: float) -> None:
        self.part, self.limit, self.started, self.late = part, limit, time.monotonic(), False
        self.out, self.log = folder / f"{part.name}.json", folder / f"{part.name}.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command(bench, part, self.out),
                env=environment(False, Launch(threads=bench.settings.threads)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Return True if it has ended; end it when its time is over."""
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
        """The result that was saved last, with what went wrong after that."""
        seconds = time.monotonic() - self.started
        found = (read_json(self.out, dict) or {}).get(self.part.measurement, {})
        for case, bars in BARS.get(self.part.name, {}).items():
            if case in found:
                found[case] |= {f"{quantity}_bar": bar for quantity, bar in bars.items()}
        if (why := self._what_failed()) and "failed" not in found:
            found["failed"] = {"error": why}
        if "failed" in found:
            found["failed"]["output"] = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return {"seconds": seconds} | found

    def _what_failed(self) -> str:
        code = self.process.returncode
        if self.late:
            return f"ended after {self.limit:.0f} s, the longest it may take within bench.budget_seconds"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return "" if code in (0, 1) and self.out.exists() else f"ended with exit code {code}"


def command(bench: Bench, part: Part, out: Path) -> list[str]:
    """The part's own settings, then the user's, which count where both are set."""
    settings = bench.settings
    passed = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in OWN and getattr(settings, field.name) != getattr(BenchSettings(), field.name)
    }
    users = [f"{PREFIX}{name}={json.dumps(value)}" for name, value in passed.items()]
    line = [sys.executable, "-m", "pipeline.bench", part.measurement]
    return [*line, *part.words.split(), *users, *bench.overrides, f"{PREFIX}out={out}"]


def lines(result: Result) -> list[str]:
    """A line for each number that matters, beside the bar or the bound that it is compared with."""
    rows: dict[str, dict[str, Any]] = {}
    if any(reason in result for reason in REASONS):
        return table.lines(result)
    for name, found in result.items():
        cases = {case: values for case, values in found.items() if isinstance(values, dict)}
        for case, values in _telling(cases).items():
            if case in REASONS:
                rows[name] = {"measured": f"{case}: {next(iter(values.values()))}"}
            else:
                rows |= _rows(f"{name}: {case}", values)
    late = [name for name, found in result.items() if "needed_seconds" in found.get("skipped", {})]
    rest = [f"No time was left for some parts. Run them with 'bench.parts=[{','.join(late)}]'."] if late else []
    return table.lines(rows) + rest


def _telling(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All cases, except that of those within their bounds only the worst is kept."""
    equal = {case: values["error"] / (values["bound"] or 1.0) for case, values in cases.items() if values.get("within")}
    worst = max(equal, key=lambda case: equal[case], default=None)
    return {case: values for case, values in cases.items() if case not in equal or case == worst}


def _rows(label: str, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    reason = next((reason for reason in REASONS if reason in values), None)
    if reason:
        return {label: {"measured": f"{reason}: {values[reason]}"}}
    bars = {quantity: values.get(f"{quantity}_bar") for quantity in SHOWN} | {"error": values.get("bound")}
    return {f"{label} {name}": {"measured": values[name], "bar": bars[name]} for name in SHOWN if name in values}
