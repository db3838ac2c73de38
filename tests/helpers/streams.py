"""Streams without a device: what they are given happens as late as the waits between them allow, in an order to choose.

So a wait that is missing gives wrong data in some order.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from octavo.optim import _paging
from torch import Tensor

STREAMS = ("in", "compute", "out")
ORDERS = [*itertools.permutations(STREAMS), *range(4)]  # whose turn it is, first the first; or at random, by a seed


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.done = machine, False

    def synchronize(self) -> None:
        self.machine.advance(lambda: self.done)


class Machine:
    """Queues of operations, each of which says whether it could be done."""

    def __init__(self, order: tuple[str, ...] | int) -> None:
        self.queues: dict[str, deque[Callable[[], bool]]] = {name: deque() for name in STREAMS}
        self.order = order
        self.random = random.Random(order if isinstance(order, int) else 0)

    def give(self, stream: str, work: Callable[[], None]) -> None:
        self.queues[stream].append(lambda: (work(), True)[1])

    def record(self, stream: str) -> Event:
        event = Event(self)
        self.give(stream, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: str, event: Event) -> None:
        self.queues[stream].append(lambda: event.done)

    def advance(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work until that holds, or all is done."""
        while not until():
            names = self.order if isinstance(self.order, tuple) else self.random.sample(STREAMS, 3)
            for name in names:
                if self.queues[name] and self.queues[name][0]():
                    self.queues[name].popleft()
                    break
            else:
                assert not any(self.queues.values()), "what is left waits for ever"
                return


class FakeCuda(_paging.Cuda):
    """Buffers in ordinary memory. The host runs kernels itself: before each it works until the stream "compute" gets
    there; other streams are left behind."""

    order: tuple[str, ...] | int = 0  # of the next one
    made: list[FakeCuda]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.machine, self.in_graph = Machine(self.order), False
        self.copied, self.users = 0, set()
        self.made.append(self)

    def capturing(self) -> bool:
        return self.in_graph

    def pinned(self, count: int) -> Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8)

    empty = pinned

    def used_by(self, buffer: Tensor, streams: Any) -> None:
        self.users |= {(buffer.data_ptr(), name) for name in streams}

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        self.copied += target.numel()
        self.machine.give(stream, lambda: target.copy_(source))

    def run(self, work: Callable[[], None]) -> None:
        self.machine.record("compute").synchronize()
        work()

    def record(self, stream: str) -> Event:
        return self.machine.record(stream)

    def wait(self, stream: str, event: Event) -> None:
        self.machine.wait(stream, event)
