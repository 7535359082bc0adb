"""Runs measurements one after the other, prints each as a table, and keeps what is known so far in one JSON file."""

import dataclasses
import importlib.metadata
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from data.durable import write_json
from pipeline.bench import registry
from pipeline.bench.settings import Bench, BenchSettings, Skipped, parse
from pipeline.runner import machine as hardware
from pipeline.runner.environment import user_path

VERSIONS = ("torch", "numpy", "triton", "tiktoken", "rustbpe", "pyarrow", "safetensors")


def run(names: list[str], arguments: list[str]) -> int:
    """Measure what names say; arguments: bench.NAME=VALUE and settings of the pipeline. 1 if a measurement failed.

    Raises UserError for a name or a setting there is not.
    """
    settings, overrides = parse(arguments)
    chosen = registry.choose(names)
    bench = Bench(settings, overrides, set_up_machine(settings))
    for name in chosen:
        registry.check(name, bench)
    out = user_path(settings.out)
    written: dict[str, Any] = about(bench)
    failed = False
    for name in chosen:
        started = time.monotonic()
        bench.say(f"\n{name}")
        result = measure(name, dataclasses.replace(bench, save=partial(_save, out, written, name)))
        failed = failed or wrong(result)
        for line in registry.lines(name, result):
            bench.say("  " + line)
        bench.say(f"  ({time.monotonic() - started:.0f} s)")
        _save(out, written, name, result)
    bench.say(f"\n{out}")
    return 1 if failed else 0


def _save(out: Path, written: dict[str, Any], name: str, result: registry.Result) -> None:
    """Save the result beside earlier ones, so that a run that ends early leaves what it had."""
    written[name] = written.get(name, {}) | result
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, written)


def wrong(found: dict[str, Any]) -> bool:
    """Return True if a measurement, or a part of it, failed or found a difference above its bound."""
    if "failed" in found or found.get("within") is False:
        return True
    return any(wrong(part) for part in found.values() if isinstance(part, dict))


def measure(name: str, bench: Bench) -> registry.Result:
    """The result, or why there is none. One that fails does not take the others' numbers with it.

    Raises what carries a cause: those are mistakes of the command line or the data.
    """
    try:
        return registry.find(name)(bench)
    except Skipped as skipped:
        return {"skipped": {"why": str(skipped)}}
    except Exception as error:
        if isinstance(getattr(error, "cause", None), str):
            raise
        traceback.print_exc()
        return {"failed": {"error": f"{type(error).__name__}: {error}"}}


def set_up_machine(settings: BenchSettings) -> Any:
    """The device, with threads and memory as training stages set them. Raises ModelError for a device there is not."""
    import torch

    from model.hardware import keep_freed_memory
    from model.training.distributed import choose_device

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
