"""Checkpoints, written in the background to a temporary folder, with checksums and the marker last. Older ones are
removed only then.

step-0000120/model.safetensors     the weights, float32
             state-R.safetensors   rank R's part of the optimiser's state and its random number generators
             checkpoint.json       the marker: step, key of the work, conditions, sha256 of the files
"""

import errno
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.distributed import World
from model.optim.optimiser import Optimizer

MARKER = "checkpoint.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, and every one whose step is a multiple of `every`."""

    last: int = 2
    every: int | None = None


class Checkpointer:
    """Saves a run into `folder`, one save at a time. A save that fails is reported and never ends the run."""

    def __init__(self, folder: Path, world: World, key: str, keep: Keep, say: Callable[[str], None]) -> None:
        self.folder, self.world, self.key, self.keep, self.say = folder, world, key, keep, say
        self.conditions: dict[str, Any] = {}  # that a resume must meet to be exact; set by the stage
        self.last_step: int | None = None
        self.thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
        """Copy the state to host memory and return; a thread writes it. Every rank calls this at the same step."""
        self.wait()
        state = {f"{name}@{first}": held for name, first, held in optimizer.pieces()} | capture_rng(self.world.device)
        parts = {f"state-{self.world.rank}.safetensors": to_host(state)}
        if self.world.is_main:
            parts["model.safetensors"] = to_host(model.state_dict())
        about = {"step": step, "key": self.key, "optimizer_steps": optimizer.steps, "progress": progress}
        about |= {"world_size": self.world.size, "conditions": self.conditions}
        self.thread = threading.Thread(target=self._write, args=(step, parts, about), name="checkpoint")
        self.thread.start()

    def wait(self) -> int | None:
        """Until the save under way has ended; the newest step that is safely on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return self.last_step

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> None:
        aside = self.folder / f".step-{step:07d}"
        failure = ""
        try:
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        except OSError as error:  # no raise: the other ranks wait below, and would be one meeting behind ever after
            failure = str(error)
        self.world.meet_aside(0)
        try:
            for name, weight in parts.get("model.safetensors", {}).items():
                if not bool(weight.isfinite().all()):  # it would push out a checkpoint that can be used
                    raise OSError(f"{name} holds NaN or infinity")
            for name, tensors in parts.items():
                write_part(aside / name, tensors)
        except (OSError, SafetensorError) as error:
            failure = failure or str(error)
        failed = self.world.meet_aside(int(bool(failure)))
        if not self.world.is_main:
            self.last_step = self.last_step if failed else step
            return
        try:
            if failed:
                raise OSError(failure or f"{failed} of the other processes could not write")
            self._publish(aside, step, about)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            stays = f"the one of step {self.last_step} stays" if self.last_step is not None else "there is none yet"
            self.say(f"the checkpoint of step {step} could not be saved in {self.folder} ({error}); {stays}")

    def _publish(self, aside: Path, step: int, about: dict[str, Any]) -> None:
        files = {}
        for path in sorted(aside.glob("*.safetensors")):
            digest = path.with_suffix(".sha256")
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest.read_text()}
            digest.unlink()
        with open(aside / MARKER, "w") as file:
            file.write(json.dumps(about | {"files": files}, indent=1))
            file.flush()
            os.fsync(file.fileno())
        final = folder_of(self.folder, step)
        if step == self.last_step and (final / MARKER).exists():  # the same state: it stopped where it had just saved
            shutil.rmtree(aside)
        else:
            remove(final)
            os.replace(aside, final)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)  # a rename is on disk once its folder is
            finally:
                os.close(handle)
        self.last_step = step
        for old in steps_in(self.folder)[: -self.keep.last] if self.keep.last else []:
            if not (self.keep.every and old % self.keep.every == 0):
                remove(folder_of(self.folder, old))


def folder_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def steps_in(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"step-*/{MARKER}"))


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory with anything that trains."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write, read back, and put the sha256 of what was read beside it. OSError when they differ or the disk is full."""
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed * 1.01:
        raise OSError(errno.ENOSPC, f"no space left: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
    save_file(tensors, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    with safe_open(path, "pt") as saved:
        for name, tensor in tensors.items():  # as bytes, since NaN differs from itself
            found, wanted = (x.reshape(-1).view(torch.uint8) for x in (saved.get_tensor(name), tensor))
            if not torch.equal(found, wanted):
                raise OSError(errno.EIO, f"{name} in {path.name} reads back differently than it was written")
    path.with_suffix(".sha256").write_text(sha256(path))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(checkpoint: Path) -> None:
    """The marker goes first, so that a half-removed checkpoint does not count as one."""
    if checkpoint.exists():
        if (checkpoint / MARKER).is_file():
            (checkpoint / MARKER).unlink()
        shutil.rmtree(checkpoint)


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    version, numbers, _ = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "rng.python": torch.tensor([version, *numbers], dtype=torch.int64),
        "rng.numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "rng.numpy_rest": torch.tensor(
            [numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]], dtype=torch.float64
        ),
        "rng.torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """The device's own generator is restored when it is of the kind that was saved."""
    version, *numbers = state["rng.python"].tolist()
    random.setstate((version, tuple(numbers), None))
    position, has_gauss, gauss = state["rng.numpy_rest"].tolist()
    keys = state["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["rng.torch"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
