"""Find a good checkpoint and resume from it, on any number of processes."""

import json
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model.distributed import World
from model.errors import ModelError
from model.optim.optimiser import Optimizer
from model.training.checkpoint import MARKER, folder_of, restore_rng, sha256, steps_in

# Fields of a marker, with their types.
ABOUT = {"step": int, "key": str, "world_size": int, "optimizer_steps": int, "progress": dict, "conditions": dict}
ABOUT |= {"files": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written. about: the content of its marker."""

    folder: Path
    about: dict[str, Any]

    @property
    def step(self) -> int:
        return self.about["step"]

    @property
    def conditions(self) -> dict[str, Any]:
        return self.about["conditions"]

    @property
    def progress(self) -> dict[str, Any]:
        return self.about["progress"]


def find(folder: Path, wanted: str | int, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint ("latest"), the one of a step, or None for "never". Every rank gets the same.

    A damaged one is passed over with a warning. Raises ModelError when a step is asked for and missing or damaged.
    """
    if wanted == "never":
        return None
    step = _find_step(folder, wanted, say) if world.is_main else 0
    step = world.sum_host([step])[0]
    if step < 0:
        if wanted == "latest":
            return None
        there = ", ".join(map(str, steps_in(folder))) or "none"
        raise ModelError(f"there is no good checkpoint of step {wanted} in {folder}; steps with one: {there}")
    checkpoint = folder_of(folder, step)
    return Checkpoint(checkpoint, read_about(checkpoint))


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The marker's content. Raises ValueError if it lacks what a resume needs, OSError if it cannot be read."""
    about = json.loads((checkpoint / MARKER).read_bytes())
    if not isinstance(about, dict) or not all(isinstance(about.get(name), kind) for name, kind in ABOUT.items()):
        raise ValueError(f"{MARKER} is not what was written")
    numbers = [about["conditions"].get(name, 0) for name in ("world_size", "micro_batch", "threads")]
    progress = about["progress"].values()  # of the trainer: no text and no lists
    if not all(isinstance(n, int) for n in numbers) or any(isinstance(value, (str, list)) for value in progress):
        raise ValueError(f"{MARKER} is not what was written")
    for name, entry in about["files"].items():
        if Path(name).name != name or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{MARKER} has no valid list of files")
    return about


def _find_step(folder: Path, wanted: str | int, say: Callable[[str], None]) -> int:
    """-1 when there is none."""
    steps = steps_in(folder) if wanted == "latest" else [int(wanted)]
    for step in reversed(steps):
        if not folder_of(folder, step).exists():
            continue  # `wanted` is the step of no checkpoint
        damage = damage_of(folder_of(folder, step))
        if not damage:
            return step
        say(f"warning: the checkpoint of step {step} cannot be used: {damage}")
    return -1


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty when every file is there with its sha256."""
    try:
        files = read_about(checkpoint)["files"]
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(lambda name: sha256(checkpoint / name), files))
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    wrong = [name for name, found in zip(files, sums) if files[name]["sha256"] != found]
    return f"{', '.join(wrong)}: the sha256 differs from what was written" if wrong else ""


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Weights, the owned part of the optimiser's state, and this rank's generators if there were as many ranks.

    Raises ModelError when the checkpoint is of another model or optimiser.
    """
    try:
        weights = load_file(checkpoint.folder / "model.safetensors")
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in model.state_dict().items()}:
            raise ModelError(f"{checkpoint.folder} is of a model with other parameters")
        model.load_state_dict(weights)
        with ExitStack() as stack:
            saved = Shards(checkpoint, stack)
            optimizer.load(saved, checkpoint.about["optimizer_steps"])
            if checkpoint.about["world_size"] == world.size:
                restore_rng(saved.rng(world.rank), world.device)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{checkpoint.folder} cannot be read: {error}") from error


class Shards:
    """The optimiser's state in the files of all ranks; implements model.optim.rules.SavedState."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.where = checkpoint.folder
        self.files = [
            stack.enter_context(safe_open(self.where / f"state-{rank}.safetensors", "pt"))
            for rank in range(checkpoint.about["world_size"])
        ]
        self.held: dict[str, list[tuple[int, int, str]]] = {}  # name -> (first element, file, key), ascending
        for number, file in enumerate(self.files):
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, at, first = key.rpartition("@")
                if at:
                    self.held.setdefault(name, []).append((int(first), number, key))
        for places in self.held.values():
            places.sort()

    def read(self, name: str, first: int, count: int) -> Tensor:
        places = self.held.get(name, [])
        parts, at = [], first
        while at < first + count:
            number = bisect_right([place[0] for place in places], at) - 1
            part = torch.empty(0)
            if number >= 0:
                start, file, key = places[number]
                part = self.files[file].get_slice(key)[at - start : first + count - start]
            if not len(part):
                raise ModelError(f"{self.where} has no state {name}: it is of another optimiser or model")
            parts.append(part)
            at += len(part)
        return torch.cat(parts)

    def all_of(self, parameter: str) -> dict[str, Tensor]:
        prefix = parameter + "."
        found = {name.removeprefix(prefix): places[0] for name, places in self.held.items() if name.startswith(prefix)}
        return {name: self.files[number].get_tensor(key) for name, (_, number, key) in found.items()}

    def rng(self, rank: int) -> dict[str, Tensor]:
        file = self.files[rank]
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng.")}  # noqa: SIM118
