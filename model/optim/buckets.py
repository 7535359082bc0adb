"""Parameters that are updated together, laid side by side in one buffer of which each rank owns an equal part."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.training.distributed import Done, World

SQUARED_AT_ONCE = 1 << 26  # gradients, to bound the memory of their squares


@dataclass(frozen=True)
class Span:
    """Owned units [start, stop) of a bucket are the units from `first` on of parameter `name`."""

    name: str
    first: int
    start: int
    stop: int


class Bucket:
    """Parameters and gradients as views of two buffers (units, *unit).

    A unit is what must stay whole on one rank: a matrix for Muon (unit = its shape), a single number for elementwise
    rules (unit = ()). The end is padded with zeros to a multiple of the world's size. With sharded=False every rank
    owns everything, and gradients are added up instead of scattered.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], world: World, matrices: bool, sharded: bool) -> None:
        self.world, self.sharded = world, sharded and world.size > 1
        self.names = [name for name, _ in named]
        first = named[0][1]
        unit = tuple(first.shape) if matrices else ()
        self.counts = [1 if matrices else parameter.numel() for _, parameter in named]
        parts = world.size if self.sharded else 1
        padded = -(-sum(self.counts) // parts) * parts
        self.params = torch.zeros(padded, *unit, device=first.device, dtype=first.dtype)
        self.grads = torch.zeros_like(self.params)
        at = 0
        for (_, parameter), count in zip(named, self.counts):
            view = self.params[at : at + count].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.grads[at : at + count].view(parameter.shape)
            at += count
        size = padded // parts
        part = world.rank if self.sharded else 0
        self.low, self.high = part * size, (part + 1) * size
        self.own, self.own_grads = self.params[self.low : self.high], self.grads[self.low : self.high]

    def spans(self) -> Iterator[Span]:
        """Which parameters, and which of their units, this rank owns."""
        at = 0
        for name, count in zip(self.names, self.counts):
            start, stop = max(at, self.low), min(at + count, self.high)
            if start < stop:
                yield Span(name, start - at, start - self.low, stop - self.low)
            at += count

    def reduce(self):
        """Start adding the gradients up; own_grads hold the sums after wait()."""
        if self.sharded:
            return self.world.reduce_scatter(self.own_grads, self.grads)
        return self.world.sum(self.grads, wait=False)

    def gather(self):
        """Start sending the updated part to the others."""
        return self.world.all_gather(self.params, self.own) if self.sharded else Done()

    def square_sum(self) -> Tensor:
        """Of the owned gradients; counted once where all ranks own them."""
        dtype = torch.promote_types(self.own_grads.dtype, torch.float32)
        parts = self.own_grads.view(-1).split(SQUARED_AT_ONCE)
        total = torch.stack([part.square().sum(dtype=dtype) for part in parts]).sum()
        return total if self.sharded or self.world.leads else torch.zeros_like(total)
