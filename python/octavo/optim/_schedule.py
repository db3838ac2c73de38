"""Which states of an optimizer are paged, in which pages, and in which order pages are copied and stepped. Nothing here
knows a device: `_paging` has those.

A page is what one copy moves: the states of some parameters that follow one another in the optimizer. On a GPU pages
are copied to one of two buffers, stepped there and copied back, by three streams that go on by themselves:

    in        load 0   load 1   (0 stored) load 2   (1 stored) load 3
    compute   (0 loaded) step 0          (1 loaded) step 1          (2 loaded) ...
    out                (0 stepped) store 0      (1 stepped) store 1

In parentheses: what a stream waits for. Two streams for copies, since a bus that carries both directions at once is
half as fast with one; two buffers, since a third would only help where a step takes longer than a copy, and a step
reads memory that is a hundred times faster than the bus.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

PAGE_BYTES = 64 << 20  # copies of this size reach the bus's bandwidth; two of them are the default budget

Page = TypeVar("Page", contravariant=True)


# ---- what is in which page -------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Decide from their sizes which states stay, and the pages of the others, by their positions, in order."""

    stay: list[int]
    pages: list[list[int]]
    buffer: int  # bytes of each of the two buffers


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in order, in groups of `capacity` bytes; what is larger is a group of its own."""
    groups: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = capacity
        groups[-1].append(i)
        room -= size
    return groups


def plan(sizes: Sequence[int], budget: int | None, held: int = 0, buffer: int = 0, staged: bool = True) -> Plan:
    """Which states stay within a budget, and the pages of the others.

    Where all fit, all stay. Else, of pages that are mapped (staged=False), the first states that fit stay, and pages
    have PAGE_BYTES. Pages that are copied also need two buffers from the budget, each as large as the largest state
    that does not stay. A few large states (embeddings) would make both large, so states stay from the largest down: as
    many as make the bytes that are needed least. What is left makes buffers up to PAGE_BYTES, then lets the first
    states that fit stay.

    Args:
        sizes: bytes of each parameter's states.
        budget: bytes; None: two pages, or what is needed.
        held: bytes of earlier states that stay.
        buffer: bytes of each buffer so far, which does not shrink.
        staged: whether pages are copied.

    Raises:
        ValueError: the budget is too small; the message has the values, but neither the optimizer nor the device.
    """
    # The sort is stable: of equal sizes the earlier state comes first.
    # The sort is stable: of equal sizes the earlier state comes first.
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i]) if staged else []
    # If the k largest stay, the device must hold them and two buffers of the size of the next.
    kept = [0, *itertools.accumulate(sizes[i] for i in order)]
    largest = [*(max(sizes[i], buffer) for i in order), buffer]
    k = min(range(len(order) + 1), key=lambda k: kept[k] + 2 * largest[k])
    needed = held + kept[k] + 2 * largest[k]
    if budget is None:
        budget = max(2 * PAGE_BYTES, needed)
    if held + sum(sizes) + 2 * buffer <= budget:
        return Plan(list(range(len(sizes))), [], buffer)
    if needed > budget:
        raise ValueError(
            f"{budget} bytes are too few: the states need {needed}, {held + kept[k]} for those that stay and twice "
            f"{largest[k]} for the largest that does not"
        )
    stay, room = set(order[:k]), budget - held - kept[k]
    if staged:
        buffer = max(largest[k], min(PAGE_BYTES, room // 2))
        room -= 2 * buffer
    for i, size in enumerate(sizes):
        if i not in stay and size <= room:
            stay.add(i)
            room -= size
    rest = [i for i in range(len(sizes)) if i not in stay]
    groups = pack([sizes[i] for i in rest], buffer if staged else PAGE_BYTES)
    return Plan(sorted(stay), [[rest[j] for j in group] for group in groups], buffer)


# ---- in which order --------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """`kind` is "load", "step" or "store", of the page at `position`; `after`: what has to have finished before."""

    kind: str
    position: int
    after: tuple[tuple[str, int], ...]


STREAMS = {"load": "in", "step": "compute", "store": "out"}  # each runs its operations in order


def schedule(buffers: Sequence[int]) -> Iterator[Op]:
    """The operations of a step over pages, given the buffer of each, in the order in which the host gives them out.

    A page is loaded while the page before it is stepped, if that is in the other buffer, and not before its buffer's
    last page is stored.
    """
    stored: dict[int, int] = {}  # the last page of each buffer
    taken: set[int] = set()
    ahead = 0
    for i, buffer in enumerate(buffers):
        while ahead < len(buffers) and ahead <= i + 1 and buffers[ahead] not in taken:
            last = stored.get(buffers[ahead])
            yield Op("load", ahead, () if last is None else (("store", last),))
            taken.add(buffers[ahead])
            ahead += 1
        yield Op("step", i, (("load", i),))
        yield Op("store", i, (("step", i),))
        taken.remove(buffer)
        stored[buffer] = i


class Device(Protocol[Page]):
    """The operations that a schedule is made of. Calls return at once where the device goes on by itself."""

    def buffer_of(self, page: Page) -> int: ...

    def load(self, page: Page) -> None:
        """Copy a page to its buffer, on the stream "in"."""

    def step(self, work: Callable[[], None]) -> None:
        """Do some work on the stream "compute"."""

    def store(self, page: Page) -> None:
        """Copy a page back, on the stream "out"."""

    def record(self, stream: str) -> Any:
        """An event that stands for all the work that this stream has been given so far."""

    def wait(self, stream: str, event: Any) -> None:
        """Let what this stream is given from now on wait for that."""


def run(
    device: Device[Page],
    pages: Sequence[Page],
    work: Callable[[int], None],
    previous: Any = None,
    operations: Iterable[Op] | None = None,
) -> Any:
    """Step over pages: `work(i)` steps those parameters whose states are in pages[i].

    Args:
        previous: what the last run over any of these pages or buffers returned: until then they are in use.
        operations: of `schedule`, unless a test has others.

    Returns: what stands for the end of all stores.
    """
    events: dict[tuple[str, int], Any] = {}
    if previous is not None:
        device.wait("in", previous)
    for op in schedule([device.buffer_of(page) for page in pages]) if operations is None else operations:
        stream = STREAMS[op.kind]
        for needed in op.after:
            device.wait(stream, events[needed])
        if op.kind == "load":
            device.load(pages[op.position])
        elif op.kind == "store":
            device.store(pages[op.position])
        else:
            device.step(functools.partial(work, op.position))
        events[op.kind, op.position] = previous = device.record(stream)
    return previous
