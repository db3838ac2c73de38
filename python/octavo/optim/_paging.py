"""The states of a paged optimizer live beside their parameters, or in pages (`_schedule`) on the host.

For parameters on a GPU, pages are pinned host memory, copied to the device for their part of the step. For parameters
on the CPU they are a memory-mapped file: kernels work on the mapping, the kernel of the operating system reads and
writes, and is told what comes next. Files are unlinked as soon as they are open, so that nothing is left in the folder
whatever ends the process, and their space is free again when the last tensor over them is: a state that was taken out
of an optimizer lives as long as any other tensor.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from . import _schedule, _state
from ._state import Make, Names, State

ALIGN = 256  # bytes: where a state may begin in a page; kernels read 16 at once, copies like more
PINNED_BLOCK = 1 << 30


def aligned(count: int) -> int:
    return (count + ALIGN - 1) // ALIGN * ALIGN


class Page:
    """A run of host memory that holds the states of some parameters.

    memory: its bytes, as copies take them; source: the buffer that they lie in, from `begin` on.
    """

    def __init__(self, pager: Pager, number: int, memory: Tensor, source: Any, begin: int) -> None:
        self.device, self.number, self.buffer = pager.device, number, number % 2
        self.memory, self.source, self.begin = memory, source, begin
        self.views: dict[int, Tensor] = {}  # in the buffer, by place

    def take(self, place: int, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor with this place in the page and a storage of its own: torch.save writes storages, and refuses one
        that tensors of several dtypes share."""
        return torch.frombuffer(self.source, dtype=dtype, count=count, offset=self.begin + place)

    def place_of(self, t: Tensor) -> int | None:
        place = t.data_ptr() - self.memory.data_ptr()
        return place if t.device.type == "cpu" and 0 <= place < self.memory.numel() else None


class OnPage(Protocol):
    """What belongs to one page, or to none."""

    page: Page | None


_Paged = TypeVar("_Paged", bound=OnPage)


class Pager(ABC):
    """Pages of the parameters on one device, and what of their states stays there."""

    staged = False  # whether the kernels need copies

    def __init__(self, device: torch.device, page_dir: str | None) -> None:
        self.device, self.page_dir = device, page_dir
        self.held = self.buffer_bytes = 0
        self.pages: list[Page] = []
        self.previous: Any = None  # stands for the last store

    @abstractmethod
    def make_pages(self, sizes: Sequence[int]) -> list[Page]:
        """Pages of these many bytes each."""

    def prepare(self) -> None:
        """Before states are staged."""

    def stage(self, page: Page, t: Tensor) -> Tensor:
        """Return the tensor that kernels get for a tensor of the page; any other tensor is returned as it is."""
        return t

    def synchronize(self) -> None:
        """Wait until the host's memory holds what the last step left."""

    # methods of _schedule.Device

    def buffer_of(self, page: Page) -> int:
        return page.buffer

    def load(self, page: Page) -> None: ...

    def step(self, work: Callable[[], None]) -> None:
        work()

    def store(self, page: Page) -> None: ...

    def record(self, stream: str) -> Any: ...

    def wait(self, stream: str, event: Any) -> None: ...


class Files(Pager):
    """Pages of parameters on the CPU lie in one file for all pages that are made at once, so that few are open however
    many parameters there are."""

    def make_pages(self, sizes: Sequence[int]) -> list[Page]:
        assert self.page_dir is not None
        mapping = map_file(self.page_dir, sum(sizes))
        pages: list[Page] = []
        begin = 0
        for size in sizes:
            memory = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=begin)
            pages.append(Page(self, len(self.pages) + len(pages), memory, mapping, begin))
            begin += size
        return pages

    def load(self, page: Page) -> None:
        """Read ahead: a fault alone reads 128 KiB where Linux is as it comes, and waits for them. (Where read-ahead was
        8 MiB, on a disk of 1.6 GB/s, faults alone were faster, 0.6 s instead of 0.8 s for 490 MB.) What memory the page
        before took is the operating system's to take back: told to drop it (MADV_DONTNEED), steps took 1.4 times as
        long where memory has room, as every page faults again."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = page.begin // mmap.PAGESIZE * mmap.PAGESIZE
            page.source.madvise(mmap.MADV_WILLNEED, begin, page.begin + page.memory.numel() - begin)


class Cuda:
    """The operations that `Pinned` needs of a GPU. Streams are "in", "out" and "compute", the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side: dict[str, torch.cuda.Stream] = {}

    def stream(self, name: str) -> torch.cuda.Stream:
        if name == "compute":
            return torch.cuda.current_stream(self.device)
        if name not in self.side:
            self.side[name] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self.side[name]

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def used_by(self, buffer: Tensor, streams: Iterable[str]) -> None:
        """When the buffer is freed, its memory is given to others after all that these streams have then."""
        for name in streams:
            buffer.record_stream(self.stream(name))

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream(stream)):
            target.copy_(source, non_blocking=True)  # torch keeps pinned memory that is freed until this is done

    def run(self, work: Callable[[], None]) -> None:
        """Do the work on the stream "compute"."""
        work()

    def record(self, stream: str) -> Any:
        return self.stream(stream).record_event()

    def wait(self, stream: str, event: Any) -> None:
        self.stream(stream).wait_event(event)


class Pinned(Pager):
    """Pages of parameters on a GPU: pinned memory, two buffers on the device, a stream for copies in each direction."""

    staged = True

    def __init__(self, device: torch.device, page_dir: str | None) -> None:
        super().__init__(device, page_dir)
        self.cuda = Cuda(device)
        self.buffers: list[Tensor] = []

    def make_pages(self, sizes: Sequence[int]) -> list[Page]:
        """Several pages to an allocation, as torch rounds one of pinned memory up to a power of 2."""
        pages: list[Page] = []
        for group in _schedule.pack(sizes, PINNED_BLOCK):
            block, begin = self.cuda.pinned(sum(sizes[i] for i in group)), 0
            source = block.numpy()  # tensors over it keep the block, by which torch knows what copies are under way
            for i in group:
                pages.append(Page(self, len(self.pages) + i, block[begin : begin + sizes[i]], source, begin))
                begin += sizes[i]
        return pages

    def prepare(self) -> None:
        if not self.pages:
            return
        if self.cuda.capturing():
            raise RuntimeError(
                f"a step with paged states cannot be captured in a CUDA graph: its copies wait for those of the step "
                f"before it. {sum(page.memory.numel() for page in self.pages)} bytes are paged on {self.device}; with "
                "a device_budget that holds all states, or paged=False, a step can be captured"
            )
        if not self.buffers or self.buffers[0].numel() < self.buffer_bytes:
            self.buffers = [self.cuda.empty(self.buffer_bytes) for _ in range(2)]
            for page in self.pages:
                page.views.clear()
            # Who had this memory before may not be done with it.
            self.cuda.wait("in", self.cuda.record("compute"))
        for buffer in self.buffers:
            self.cuda.used_by(buffer, ("in", "compute", "out"))

    def stage(self, page: Page, t: Tensor) -> Tensor:
        place = page.place_of(t)
        if place is None:
            return t
        view = page.views.get(place)
        if view is None:
            flat = self.buffers[page.buffer][place : place + t.nbytes]
            view = page.views[place] = flat.view(t.dtype).view(t.shape)
        return view

    def synchronize(self) -> None:
        if self.previous is not None:
            self.previous.synchronize()

    def load(self, page: Page) -> None:
        self.cuda.copy("in", self.buffers[page.buffer][: page.memory.numel()], page.memory)

    def step(self, work: Callable[[], None]) -> None:
        self.cuda.run(work)

    def store(self, page: Page) -> None:
        self.cuda.copy("out", page.memory, self.buffers[page.buffer][: page.memory.numel()])

    def record(self, stream: str) -> Any:
        return self.cuda.record(stream)

    def wait(self, stream: str, event: Any) -> None:
        self.cuda.wait(stream, event)


def map_file(folder: str, count: int) -> mmap.mmap:
    """A writable mapping of `count` bytes, all 0, of a new file without a name, whose space is taken: without that, a
    full disk would end the process with SIGBUS at some later write.

    Raises:
        OSError: what keeps the folder from holding it, with the folder, the bytes that were wanted and those free.
    """
    free: int | None = None
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if count > free:  # some file systems would fill themselves up to learn it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _take_space(file.fileno(), count)
            return mmap.mmap(file.fileno(), max(count, 1))
    except OSError as error:
        number = error.errno or errno.EIO
        of_space = free is not None and number in (errno.ENOSPC, errno.EFBIG)
        have = f", {free} bytes are free" if of_space else ""
        raise OSError(
            number, f"page_dir {folder!r} cannot hold {count} bytes of states: {os.strerror(number)}{have}"
        ) from error


def _take_space(file: int, count: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file, 0, max(count, 1))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system cannot (ZFS, NFS)
                raise
    zeros = bytes(1 << 20)
    for begin in range(0, max(count, 1), len(zeros)):
        left = memoryview(zeros)[: max(count, 1) - begin]
        while left:
            left = left[os.write(file, left) :]


# ---- all devices of an optimizer -------------------------------------------------------------------------------------


class Options(TypedDict, total=False):
    """Options of an optimizer, not of its parameter groups: a state that is loaded leaves them as they are."""

    paged: bool
    page_dir: str | os.PathLike[str] | None
    device_budget: int | None


class Paging:
    """The pages of one optimizer, by device. Copied or pickled, it is one without pages and with the same options."""

    def __init__(self, owner: str, page_dir: str | None, device_budget: int | None) -> None:
        self.owner, self.page_dir, self.device_budget = owner, page_dir, device_budget
        self.pagers: dict[torch.device, Pager] = {}
        self.places: dict[Tensor, tuple[Page, int] | None] = {}  # where states begin; None: they stay

    def __reduce__(self) -> tuple[type[Paging], tuple[str, str | None, int | None]]:
        return Paging, (self.owner, self.page_dir, self.device_budget)

    def without_pages(self) -> Paging:
        return Paging(self.owner, self.page_dir, self.device_budget)

    @staticmethod
    def of(owner: str, options: Options) -> Paging | None:
        """Make the pager that the options ask for, after checking them; None if the optimizer is not paged."""
        paged, folder, budget = options.get("paged", False), options.get("page_dir"), options.get("device_budget")
        if not isinstance(paged, bool):
            raise ValueError(f"{owner}: paged must be True or False, got {paged!r}")
        if not paged:
            for name, value in (("page_dir", folder), ("device_budget", budget)):
                if value is not None:
                    raise ValueError(f"{owner}: {name}={value!r} needs paged=True")
            return None
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"{owner}: device_budget must be None, 0 or a positive number of bytes, got {budget!r}")
        if folder is not None:
            given, folder = folder, os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
            if not isinstance(folder, str):
                raise ValueError(f"{owner}: page_dir must be a path, got {given!r}")
            try:
                map_file(folder, 0)  # now, not hours of loading data later
            except OSError as error:
                raise _of(owner, error) from error
            except ValueError as error:  # a NUL, or what no name can be encoded to
                raise ValueError(f"{owner}: page_dir {folder!r} cannot be a path: {error}") from error
        return Paging(owner, folder, budget)

    def check(self, param: Tensor, where: str) -> None:
        if param.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(
                f"{where} is on {param.device}: paged=True is for parameters on the CPU and on CUDA devices"
            )
        if param.device.type == "cuda" and _state.is_dtensor(param):
            raise ValueError(
                f"{where} is a DTensor of shape {list(param.shape)} on {param.device}: paged=True is for parameters of "
                "one device, and on the CPU for DTensors too: their states would be DTensors with shards on the host"
            )

    def _pager(self, device: torch.device) -> Pager | None:
        """None: states are ordinary tensors there."""
        if device not in self.pagers:
            if device.type == "cpu" and self.page_dir is None:
                return None
            self.pagers[device] = (Files if device.type == "cpu" else Pinned)(device, self.page_dir)
        return self.pagers[device]

    # ---- places ----

    def reserve(self, wanted: Sequence[tuple[Tensor, int]]) -> None:
        """Decide where the states of these parameters will be, given their bytes, and make pages: all or none.

        Raises:
            ValueError: device_budget is too small.
            OSError: the folder cannot hold them.
        """
        made: list[tuple[Pager, _schedule.Plan, list[Page], list[Tensor], list[int]]] = []
        for device in dict.fromkeys(param.device for param, size in wanted if size):
            if (pager := self._pager(device)) is None:
                continue
            params = [param for param, size in wanted if size and param.device == device]
            sizes = [size for param, size in wanted if size and param.device == device]
            try:
                plan = _schedule.plan(sizes, self.device_budget, pager.held, pager.buffer_bytes, pager.staged)
            except ValueError as error:
                raise ValueError(f"{self.owner}: device_budget on {device}: {error}") from None
            try:
                pages = pager.make_pages([sum(sizes[i] for i in page) for page in plan.pages]) if plan.pages else []
            except OSError as error:
                raise _of(self.owner, error) from error
            made.append((pager, plan, pages, params, sizes))
        for pager, plan, pages, params, sizes in made:
            pager.held += sum(sizes[i] for i in plan.stay)
            pager.buffer_bytes = plan.buffer
            pager.pages += pages
            self.places.update((params[i], None) for i in plan.stay)
            for page, members in zip(pages, plan.pages, strict=True):
                place = 0
                for i in members:
                    self.places[params[i]] = page, place
                    place += sizes[i]

    @staticmethod
    def size_of(state: State, names: Names) -> int:
        return sum(aligned(_state.local_of(state[key]).nbytes) for key in _tensors(state, names))

    def maker(self, param: Tensor) -> Make:
        """Makes the states of a parameter where they were reserved a place, one after another."""
        beside, found = _state.beside(param), self.places.get(param)
        if found is None:
            return beside
        page, place = found

        def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal place
            count = math.prod(shape)
            if count == 0:  # is no part of a buffer
                return beside(shape, dtype)
            made = page.take(place, count, dtype).view(shape)
            place += aligned(made.nbytes)
            return made

        return make

    def put(self, param: Tensor, state: State, names: Names, copied: bool = False) -> None:
        """Move the states of a parameter to where they were reserved a place. copied: what is in place, too."""
        make = self.maker(param)
        for key in _tensors(state, names):
            value, shape = _state.local_of(state[key]), tuple(state[key].shape)
            if self.places.get(param) is not None:
                moved = make(value.shape, value.dtype).copy_(value)
            else:
                moved = value.to(_state.local_of(param).device, copy=copied)
            if moved is not value:
                state[key] = _state.like(moved, param, shape)

    def page_of(self, param: Tensor) -> Page | None:
        found = self.places.get(param)
        return found[0] if found is not None and found[0].device == param.device else None

    # ---- a step ----

    def prepare(self) -> None:
        for pager in self.pagers.values():
            pager.prepare()

    def stage(self, page: Page, tensors: Iterable[Tensor]) -> list[Tensor]:
        pager = self.pagers[page.device]
        return [pager.stage(page, t) for t in tensors]

    def run(self, launches: Sequence[_Paged], launch: Callable[[_Paged], None]) -> None:
        """Step what is paged."""
        for device, pager in self.pagers.items():
            by_page: dict[Page, list[_Paged]] = {}
            for item in launches:
                if item.page is not None and item.page.device == device:
                    by_page.setdefault(item.page, []).append(item)
            if not by_page:
                continue
            pages = sorted(by_page, key=lambda page: page.number)

            def work(i: int, by_page: dict[Page, list[_Paged]] = by_page, pages: list[Page] = pages) -> None:
                for item in by_page[pages[i]]:
                    launch(item)

            pager.previous = _schedule.run(pager, pages, work, pager.previous)

    def synchronize(self) -> None:
        for pager in self.pagers.values():
            pager.synchronize()

    def paged_bytes(self) -> int:
        return sum(page.memory.numel() for pager in self.pagers.values() for page in pager.pages)


def _tensors(state: State, names: Names) -> list[str]:
    """The keys of what can be in a page: all but the step and what is not ours."""
    keys = dict.fromkeys((*names.plain, *names.codes, *names.absmax, "compensation"))
    return [key for key in keys if key in state]


def _of(owner: str, error: OSError) -> OSError:
    return OSError(error.errno, f"{owner}: {error.strerror}")
