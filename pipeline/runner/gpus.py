"""The GPUs of this machine, each used by one stage at a time, whichever run it belongs to."""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from pipeline.errors import Interrupted, UserError
from pipeline.numbers import plural
from pipeline.plan.dag import Stage
from pipeline.runner import machine as hardware


def lacking(stage: Stage) -> str:
    """A message about what this machine lacks to run the stage as it is set. Empty if nothing is missing."""
    launch, there = stage.launch, len(hardware.gpus())
    if not stage.module.RANKS or launch.device == "cpu":
        return ""
    if launch.device == "mps":
        return "" if hardware.has_mps() else "launch.device=mps needs Apple's GPU, which this machine does not have"
    if (launch.device == "auto" and not there) or (not there and hardware.has_unnamed_gpus()):
        return ""
    if launch.nproc <= there:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    wanted = f"launch.device={launch.device} with launch.nproc={launch.nproc}"
    return f"{wanted} needs {launch.nproc} GPU{'s' * (launch.nproc > 1)}; this machine has {there or 'none'}{named}"


def check(stage: Stage) -> None:
    """Raise UserError if this machine lacks what the stage is set to run on."""
    if missing := lacking(stage):
        raise UserError(missing, stage.name, "Omit launch= to use what this machine has, or run on another one.")


def taken_by(
    stage: Stage, on_wait: Callable[[str], None], stop: Callable[[], bool]
) -> AbstractContextManager[dict[str, str]]:
    """`take` for a stage that runs on GPUs; nothing for others."""
    if not stage.module.RANKS or stage.launch.device not in ("auto", "cuda"):
        return nullcontext({})
    return take(stage.launch.nproc, stage.name, on_wait, stop)


@contextmanager
def take(
    count: int, stage: str, on_wait: Callable[[str], None], stop: Callable[[], bool], folder: Path | None = None
) -> Iterator[dict[str, str]]:
    """Take `count` GPUs that no other stage on this machine uses. Yields variables for the stage's processes.

    Each GPU has a lock in `folder` (default: the temporary folder, which all runs share), released when its holder
    ends. Several are taken in order, all or none, so that two waiting stages cannot block each other. Nothing is taken
    where GPUs cannot be listed (as under WSL).

    Raises UserError if there are fewer, Interrupted if `stop` becomes true while waiting.
    """
    names = hardware.gpus()
    if not names:
        yield {}
        return
    if count > len(names):
        what = f"is {count}, but this machine has {plural(len(names), 'GPU')}"
        raise UserError(what, "launch.nproc", "Set fewer.")
    folder = folder or Path(tempfile.gettempdir())
    while len(held := _take_free(count, names, folder)) < count:
        on_wait(f"{count} of {plural(len(names), 'GPU')}, in use by other stages")
        if stop():
            raise Interrupted(f"{stage} had not started")
        time.sleep(0.5)
    try:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
    finally:
        for fd in held.values():
            os.close(fd)


def _take_free(count: int, names: list[str], folder: Path) -> dict[str, int]:
    """Locked files by GPU: `count` of them, or none."""
    held: dict[str, int] = {}
    for name in names:
        fd = _open(folder / f"chatmill-gpu-{re.sub(r'[^0-9A-Za-z]', '-', name)}")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        held[name] = fd
        if len(held) == count:
            return held
    for fd in held.values():
        os.close(fd)
    return {}


def _open(path: Path) -> int:
    """Open a lock file, which may be another user's. Returns the fd."""
    try:
        return os.open(path, os.O_RDONLY)  # O_CREAT on another user's file in /tmp is refused (fs.protected_regular)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
