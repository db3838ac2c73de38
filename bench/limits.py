"""The machine's own limits, measured on the spot: what the figures of a bench are to be held against."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from .common import cuda_clock, last_level_cache

LOOP_S = 0.03
REPEATS = 9


@dataclass
class Limits:
    """Bytes and operations per second, with this many threads. The best of a few runs: neighbours only slow it."""

    threads: int
    level: str  # the ISA level in force, or the GPU
    read: float
    read_median: float
    peaks: dict[str, float] = field(default_factory=dict)  # "int8", "fma" (fp32) at `level`
    lower_levels: dict[str, float] = field(default_factory=dict)  # "int8 avx2", ...: what other levels would allow
    missing: list[str] = field(default_factory=list)

    def bound(self, ops: float, moved: float, kind: str | None) -> tuple[str | None, float]:
        """Which limit binds ("memory" or "compute"), and the least seconds that it allows.

        For a kind whose peak was not measured (bf16), fp32's decides whether memory binds for certain; else (None, 0).
        """
        memory_s = moved / self.read
        compute_s = ops / self.peaks[kind or "fma"] if (kind or "fma") in self.peaks else 0.0
        if memory_s >= compute_s:
            return "memory", memory_s
        return ("compute", compute_s) if kind else (None, 0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def on_threads(work: Sequence[Callable[[], float]], busy: bool = False) -> float:
    """Run the pieces at once, one thread each (they release the GIL); the sum of their results per second.

    With `busy`, per second of processor time: for loops on registers, whose rate a neighbour does not change.
    """
    gate = threading.Barrier(len(work))
    finished: list[tuple[float, float, float, float]] = []  # each thread's start, stop, processor time, result

    def one(piece: Callable[[], float]) -> None:
        gate.wait()
        start, start_busy = time.perf_counter(), time.thread_time()
        result = piece()
        finished.append((start, time.perf_counter(), time.thread_time() - start_busy, result))

    threads = [threading.Thread(target=one, args=(piece,)) for piece in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts, stops, seconds, results = zip(*finished, strict=True)
    if busy:
        return sum(result / second for result, second in zip(results, seconds, strict=True))
    return sum(results) / (max(stops) - min(starts))


def cpu_peak(kind: str, threads: int) -> float:
    """Operations per second of the core's loop `kind` at the ISA level in force."""
    from octavo import _C

    iterations, seconds = 500, 0.0
    while seconds < LOOP_S:
        iterations *= 2
        start = time.thread_time()
        _C.peak(kind, iterations)
        seconds = time.thread_time() - start
    return max(on_threads([lambda: _C.peak(kind, iterations)] * threads, busy=True) for _ in range(REPEATS))


def cpu_read(threads: int) -> tuple[float, float]:
    """Best and median read bandwidth over a buffer that no cache holds.

    Taken an eighth at a time, about a cache's size: short enough that some samples escape a busy machine.
    """
    from octavo import _C

    chunk = max(32 << 20, last_level_cache()) // threads // 4096 * 4096
    buffers = [memoryview(bytearray(8 * chunk)) for _ in range(threads)]

    def read(part: memoryview) -> float:
        _C.read_all(part)
        return float(len(part))

    rates = []
    for index in range(8 * REPEATS):
        at = index % 8 * chunk
        rates.append(on_threads([functools.partial(read, buffer[at : at + chunk]) for buffer in buffers]))
    return max(rates), statistics.median(rates)


def measure_cpu(threads: int) -> Limits:
    from octavo import _C

    best, median = cpu_read(threads)
    in_force = _C.isa()
    limits = Limits(threads, in_force.name, best, median)
    limits.peaks = {kind: cpu_peak(kind, threads) for kind in ("int8", "fma")}
    try:
        for level in _C.available_isas():
            if int(level) < int(in_force):
                _C.set_isa(level)
                limits.lower_levels[f"int8 {level.name}"] = cpu_peak("int8", threads)
    finally:
        _C.set_isa(in_force)
    usable = {level.name for level in _C.available_isas()}
    limits.missing = [f"{name}: not on this machine" for name in _C.Isa.__members__ if name not in usable]
    return limits


def measure_cuda(device: str) -> Limits:
    """Reads by a sum over 1 GiB; the int8 peak is what cuBLAS reaches on a large square product."""
    data = torch.ones(1 << 28, device=device)
    rates = [data.numel() * 4 / cuda_clock(lambda: data.sum()) for _ in range(REPEATS + 2)][2:]
    limits = Limits(0, torch.cuda.get_device_name(device), max(rates), statistics.median(rates))
    side = 8192
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
    square = 2.0 * side**3
    seconds = [cuda_clock(lambda: torch._int_mm(codes, codes.t())) for _ in range(REPEATS + 2)][2:]
    limits.peaks["int8"] = square / min(seconds)
    limits.missing = ["fma: not measured on a GPU"]
    return limits


def measure(threads: int, device: str = "cpu") -> Limits:
    return measure_cuda(device) if torch.device(device).type == "cuda" else measure_cpu(threads)


def print_limits(console: Console, limits: Limits) -> None:
    compute = [f"{kind} {rate / 1e12:.3f} TOP/s" for kind, rate in (limits.peaks | limits.lower_levels).items()]
    threads = "1 thread" if limits.threads == 1 else f"{limits.threads or 'all'} threads"
    console.print(
        f"limits of {limits.level}, {threads}: read {limits.read / 1e9:.1f} GB/s "
        f"(median {limits.read_median / 1e9:.1f}), {', '.join(compute)}"
    )
    for reason in limits.missing:
        console.print(f"  {reason}")
