"""The hardware of this machine, found without importing torch."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config.quoting import chosen


def gpus() -> list[str]:
    """Visible NVIDIA GPUs, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for v in visible.split(",") if (name := v.strip()) not in ("", "-1")]
    found = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    return [str(index) for index in range(found)]  # CUDA counts from 0 whatever the device files are called


def has_unnamed_gpus() -> bool:
    """Return True if there may be GPUs that gpus() cannot list: under WSL, AMD's, on Jetson boards."""
    return any(Path(device).exists() for device in ("/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu", "/dev/nvgpu"))


def has_mps() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def launch_overrides(overrides: list[str]) -> list[str]:
    """The launch group that fits this machine, unless the user has chosen one."""
    if chosen(overrides, "launch="):
        return []
    used = _gpus_that_share_a_batch()
    if used == 0:
        return ["launch=cpu"]
    return ["launch=gpu1"] if used == 1 else ["launch=node8", f"launch.nproc={used}"]


def idle_gpus_note(overrides: list[str]) -> str | None:
    """A note about GPUs that a run will not use although nobody asked for fewer."""
    found, used = len(gpus()), _gpus_that_share_a_batch()
    if found == used or chosen(overrides, "launch=", "launch.nproc="):
        return None
    return (
        f"Uses {used} of the {found} GPUs, because batch sizes are powers of two. To use all of them, set "
        f"launch.nproc={found} and STAGE.params.total_batch_tokens to a size that {found} processes can share."
    )


def _gpus_that_share_a_batch() -> int:
    """The largest power of two of them: default batches are powers of two, which other numbers do not divide."""
    found = len(gpus())
    return 1 << found.bit_length() - 1 if found else 0


def cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Facts about this host, recorded beside what it made."""
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
        "gpus": len(gpus()),
    }
