"""Prefetching: the next batches are made and copied to the device while the current one trains."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -1
AHEAD = 2  # batches made ahead

# step -> this rank's tokens and targets, both (rows, T) int64 on the CPU
Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one step on the device. counted: targets other than -1, by micro-batch."""

    tokens: Tensor
    targets: Tensor
    counted: list[int]


class Prefetcher:
    """Makes the batches of steps [first, last) in order. close() ends its thread; next() raises the thread's errors."""

    def __init__(self, batches: Batches, first: int, last: int, micro_batch: int, device: torch.device) -> None:
        self.batches, self.micro_batch, self.device = batches, micro_batch, device
        self.ready: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(first, last), name="prefetcher", daemon=True)
        self.thread.start()

    def next(self) -> Batch:
        made = self.ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        self.closed.set()
        while self.thread.is_alive():  # it may wait for room in the queue
            while not self.ready.empty():
                self.ready.get_nowait()
            self.thread.join(timeout=0.01)

    def _work(self, first: int, last: int) -> None:
        try:
            for step in range(first, last):
                self.ready.put(self._make(step))
                if self.closed.is_set():
                    return
        except BaseException as error:  # for the thread that waits for the batch
            self.ready.put(error)

    def _make(self, step: int) -> Batch:
        tokens, targets = self.batches(step)
        counted = [int((part != IGNORE).sum()) for part in targets.split(self.micro_batch)]
        if self.device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        device = self.device
        return Batch(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True), counted)
