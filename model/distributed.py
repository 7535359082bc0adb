"""Processes that train together: their ranks and collectives. gloo on CPU, nccl on CUDA."""

import random
from dataclasses import dataclass
from typing import Union

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.device import choose_device


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Return at once."""


Handle = Union["dist.Work", Done]  # quoted, as torch may be built without distributed


@dataclass(frozen=True)
class World:
    """The processes of one training run. With size 1 there is no process group, and collectives do nothing."""

    rank: int
    size: int
    device: torch.device
    aside: "dist.ProcessGroup | None" = None  # for the thread that writes checkpoints

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor, wait: bool = True) -> Handle:
        """Sum `tensor` over the ranks, in place and on its own device."""
        if self.size == 1:
            return Done()
        work = dist.all_reduce(tensor, async_op=True)
        if wait:
            work.wait()
        return work

    def sum_host(self, values: list[int]) -> list[int]:
        """Integers summed over the ranks through the CPU, which does not wait for the GPU's queue."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_floats(self, values: list[float]) -> list[float]:
        """Numbers added up over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        self.sum(total)
        return total.tolist()

    def min_host(self, value: int) -> int:
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def reduce_scatter(self, own: Tensor, whole: Tensor) -> Handle:
        """own becomes this rank's equal part of `whole` summed over the ranks. Not awaited."""
        if self.size == 1:
            return Done()
        return _reduce_scatter(own, whole, async_op=True)

    def all_gather(self, whole: Tensor, own: Tensor) -> Handle:
        """whole becomes the parts of all ranks side by side; own may be a part of it. Not awaited."""
        if self.size == 1:
            return Done()
        return _all_gather(whole, own, async_op=True)

    def barrier(self) -> None:
        self.sum_host([0])

    def meet_aside(self, value: int) -> int:
        """The sum of `value` over the ranks, for the thread that writes checkpoints; the main thread never calls it."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, group=self.aside)
        return int(tensor)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


# Renamed in torch 2.13; the old names still work there, with a warning.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start(rank: int, local_rank: int, size: int, device: str = "auto") -> World:
    """Join the other processes, which torchrun describes in the environment. device: auto | cpu | cuda | mps.

    Raises ModelError when the device is missing or there are fewer GPUs than processes on this host.
    """
    own = choose_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size == 1:
        return World(rank, size, own)
    # CPU tensors travel through gloo on GPU machines too: control never waits for the GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", "env://")
    return World(rank, size, own, aside=dist.new_group(backend="gloo"))


def seed_everything(seed: int, rank: int) -> None:
    """Ranks draw different numbers (dropout), each the same ones in every run."""
    mixed = np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
    random.seed(int(mixed))
    np.random.seed(int(mixed & np.uint64(0xFFFFFFFF)))
