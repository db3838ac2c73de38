"""Cases in a process of their own, so that one that ends it is reported, and the others of a file still run."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator

import torch

SPACE = 3 << 30  # bytes that a case may take beyond what there is


def in_child(run: Callable[[int], None], cases: Iterator[int]) -> tuple[str, int]:
    """Run cases in a child until one raises or ends it. Returns what went wrong, or "", and the last case."""
    with tempfile.TemporaryFile() as file:
        if (child := os.fork()) == 0:
            number = -1
            try:
                torch.set_num_threads(1)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_AS, (_mapped() + SPACE,) * 2)
                for number in cases:
                    os.pwrite(file.fileno(), f"{number:<20}".encode(), 0)
                    run(number)
                os._exit(0)
            except BaseException as error:
                os.pwrite(file.fileno(), f"{number:<20}{type(error).__name__}: {error}".encode()[:4000], 0)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        said = os.pread(file.fileno(), 5000, 0).decode(errors="replace")
    problem = f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else said[20:]
    return problem if status else "", int(said[:20] or -1)


def _mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE
