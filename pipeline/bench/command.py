"""Runs measurements one after the other, prints each as a table, and keeps what is known so far in one JSON file."""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.bench import registry, table
from pipeline.bench.settings import Bench, BenchSettings, Skipped, parse

RESULT_NEUTRAL = "measures; makes nothing"

VERSIONS = ("torch", "numpy", "triton", "tiktoken", "rustbpe", "pyarrow", "safetensors")


def run(names: list[str], arguments: list[str]) -> int:
    """Measure what names say; arguments: bench.NAME=VALUE and settings of the pipeline. 1 if a measurement failed.

    Raises UserError for a name or a setting there is not.
    """
    settings, overrides = parse(arguments)
    chosen = registry.choose(names)
    bench = Bench(settings, overrides, set_up_machine(settings))
    out = Path(settings.out)
    written: dict[str, Any] = about(bench)
    failed = False
    for name in chosen:
        started = time.monotonic()
        bench.say(f"\n{name}")
        result, wrong = measure(name, bench)
        failed = failed or wrong
        for line in table.lines(result):
            bench.say("  " + line)
        bench.say(f"  ({time.monotonic() - started:.0f} s)")
        written[name] = result
        write(out, written)
    bench.say(f"\n{out}")
    return 1 if failed else 0


def measure(name: str, bench: Bench) -> tuple[registry.Result, bool]:
    """(result, whether it failed). One that fails does not take the others' numbers with it.

    Raises what carries a cause: those are mistakes of the command line or the data.
    """
    try:
        return registry.find(name)(bench), False
    except Skipped as skipped:
        return {"skipped": {"why": str(skipped)}}, False
    except Exception as error:
        if isinstance(getattr(error, "cause", None), str):
            raise
        traceback.print_exc()
        return {"failed": {"error": f"{type(error).__name__}: {error}"}}, True


def set_up_machine(settings: BenchSettings) -> Any:
    """The device, with threads and memory as training stages set them. Raises ModelError for a device there is not."""
    import torch

    from model.distributed import choose_device
    from model.hardware import keep_freed_memory

    torch.set_num_threads(settings.threads or hardware.cores())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    keep_freed_memory()
    return choose_device(settings.device)


def about(bench: Bench) -> dict[str, Any]:
    """What the numbers are of: machine, versions, date (UTC), settings."""
    import torch

    machine = {name: value for name, value in hardware.describe().items() if name not in ("host", "python")}
    machine["device"] = bench.device.type
    machine["threads"] = torch.get_num_threads()
    if bench.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(bench.device)
        machine["gpu_memory_gb"] = torch.cuda.get_device_properties(bench.device).total_memory / 1e9
    return {
        "machine": machine,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": dataclasses.asdict(bench.settings) | {"overrides": bench.overrides},
    }


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one that is not here
    return found


def write(path: Path, written: dict[str, Any]) -> None:
    """Whole or not at all, so that a run that ends early leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(written, indent=1) + "\n")
    os.replace(temporary, path)
