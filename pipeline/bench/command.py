"""Runs measurements one after the other, prints each as a table, and keeps all results in one JSON file."""

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
from pipeline.bench.registry import Bench, Result, Skipped
from pipeline.bench.tables import print_table
from pipeline.errors import FOR_USERS
from pipeline.runner import machine
from pipeline.runner.environment import user_path

VERSIONS = ("torch", "numpy", "triton", "tiktoken", "rustbpe", "pyarrow", "safetensors")


def run(names: list[str], arguments: list[str]) -> int:
    """Run the named measurements; arguments: bench.NAME=VALUE and settings of the pipeline. Returns 1 if one failed.

    Raises UserError for an unknown name or setting.
    """
    settings, overrides = registry.parse(arguments)
    names = registry.choose(names)
    bench = prepare(settings, overrides)
    if "gpu" in names:
        from pipeline.bench import gpu

        gpu.check(bench)
    out = user_path(settings.out)
    written = about(bench)
    failed = False
    for name in names:
        started = time.monotonic()
        bench.say(f"\n{name}")
        bench.save = partial(_save, out, written, name)
        result = measure(name, bench)
        failed = failed or wrong(result)
        if name == "gpu":
            gpu.print_summary(result)
        else:
            print_table(result)
        bench.say(f"  ({time.monotonic() - started:.0f} s)")
        bench.save(result)
    bench.say(f"\n{out}")
    return 1 if failed else 0


def prepare(settings: registry.BenchSettings, overrides: list[str]) -> Bench:
    """Set up threads and memory as training stages do. Raises ModelError for a device that is not available."""
    import torch

    from model.device import choose_device, keep_freed_memory

    torch.set_num_threads(settings.threads or machine.cores())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    keep_freed_memory()
    return Bench(settings, overrides, choose_device(settings.device))


def measure(name: str, bench: Bench) -> Result:
    """Return the result, or why there is none: a measurement that fails does not affect the others.

    Raises errors that are meant for the user: those are mistakes in the command line or the data.
    """
    try:
        return registry.find(name)(bench)
    except Skipped as skipped:
        return {"skipped": {"why": str(skipped)}}
    except FOR_USERS:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"failed": {"error": f"{type(error).__name__}: {error}"}}


def wrong(found: dict[str, Any]) -> bool:
    """Return True if a measurement, or a part of it, failed or found a difference above its bound."""
    if "failed" in found or found.get("within") is False:
        return True
    return any(wrong(part) for part in found.values() if isinstance(part, dict))


def _save(out: Path, written: dict[str, Any], name: str, result: Result) -> None:
    written[name] = written.get(name, {}) | result
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, written)


def about(bench: Bench) -> dict[str, Any]:
    """Return what the numbers belong to: machine, versions, date (UTC), settings."""
    import torch

    described = {name: value for name, value in machine.describe().items() if name not in ("host", "python")}
    described |= {"device": bench.device.type, "threads": torch.get_num_threads()}
    if bench.device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(bench.device)
        described["gpu_memory_gb"] = torch.cuda.get_device_properties(bench.device).total_memory / 1e9
    versions = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one
    return {
        "machine": described,
        "versions": versions,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": dataclasses.asdict(bench.settings) | {"overrides": bench.overrides},
    }
