"""What this machine has, found without importing torch."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULT_NEUTRAL = "describes the machine; devices never enter a key"


def gpu_count() -> int:
    """Visible NVIDIA GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])


def launch_overrides(overrides: list[str]) -> list[str]:
    """The launch group that fits this machine, unless the user chose one."""
    if any(o.lstrip("+~").startswith("launch=") for o in overrides):
        return []
    gpus = gpu_count()
    if gpus == 0:
        return ["launch=cpu"]
    return ["launch=gpu1"] if gpus == 1 else ["launch=node8", f"launch.nproc={gpus}"]


def habit_overrides(overrides: list[str]) -> list[str]:
    """What environment variables of older scripts mean here, unless the command line says otherwise."""
    name = os.environ.get("WANDB_RUN", "dummy")
    if name == "dummy" or any(o.lstrip("+~").startswith("logger") for o in overrides):
        return []
    mode = ["logger.mode=offline"] if os.environ.get("WANDB_MODE") == "offline" else []
    return ["logger=wandb", f"logger.name={name}", *mode]


def cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Host facts recorded beside what was made here."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": model,
        "cores": cores(),
        "gpus": gpu_count(),
    }
