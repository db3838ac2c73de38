"""What every family's bench shares: paired timing, operands that come from memory, the machine, records, tables."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from octavo.core.machine import describe_machine as describe_machine
from octavo.core.machine import last_level_cache as last_level_cache
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

SCHEMA = 1
Call = Callable[[], object]


# ---- paired timing -------------------------------------------------------------------------------------------------


Clock = Callable[[Call], float]  # seconds that a call takes


def cpu_clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Call) -> float:
    """Between two events on the stream: launches may run ahead of the GPU, nothing inside synchronises."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def clock_for(device: str) -> Clock:
    return cuda_clock if torch.device(device).type == "cuda" else cpu_clock


@dataclass(frozen=True)
class Effort:
    """How long to measure: a sample lasts at least `sample_s`; rounds fill `budget_s`, within their bounds."""

    sample_s: float = 5e-3
    budget_s: float = 20.0
    min_rounds: int = 5
    max_rounds: int = 101

    def rounds(self, one_round_s: float) -> int:
        fitting = self.budget_s / max(one_round_s, 1e-9)
        return int(max(self.min_rounds, min(self.max_rounds, fitting)))


FULL = Effort()
QUICK = Effort(sample_s=3e-3, budget_s=5.0, min_rounds=3)


@dataclass(frozen=True)
class Timing:
    samples: tuple[float, ...]  # seconds per call, one per round
    busy: tuple[float, ...]  # processor seconds per call, of all threads: what a busy machine changes least
    inner: int  # calls per sample

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)


def time_paired(
    contenders: Mapping[str, Sequence[Call]], effort: Effort, clock: Clock = cpu_clock
) -> dict[str, Timing]:
    """Time contenders against each other: A B C, C B A, A B C, ... in one process.

    A neighbour on the machine, or a clock that drifts, then hits all contenders of a round alike, and the ratio within
    a round is worth more than the times. Each contender is a list of calls that do the same work on different copies
    of its operands; they are taken in turn, so that with enough copies none finds its operands in a cache.
    """
    if not contenders or any(not calls for calls in contenders.values()):
        raise ValueError("time_paired: every contender needs at least one call")
    turns, inner = {}, {}
    for name, calls in contenders.items():
        for call in calls:  # warm-up of every copy: lazy packing, thread pools, page faults
            call()
        turns[name] = itertools.cycle(calls)
        once = min(clock(calls[0]) for _ in range(2))
        inner[name] = max(1, math.ceil(effort.sample_s / max(once, 1e-7)))

    def run(name: str) -> None:
        turn = turns[name]
        for _ in range(inner[name]):
            next(turn)()

    order = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in order}
    busy: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds, done = effort.max_rounds, 0
        while done < rounds:
            began = time.perf_counter()
            for name in order if done % 2 == 0 else reversed(order):
                start = time.process_time()
                samples[name].append(clock(functools.partial(run, name)) / inner[name])
                busy[name].append((time.process_time() - start) / inner[name])
            if done == 0:
                rounds = effort.rounds(time.perf_counter() - began)
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples[name]), tuple(busy[name]), inner[name]) for name in order}


def paired_ratio(this: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of this[i] / other[i] over the rounds i that both were timed in."""
    if len(this) != len(other) or not this:
        raise ValueError(f"not paired: {len(this)} and {len(other)} rounds")
    ratios = [a / b for a, b in zip(this, other, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


# ---- operands that come from memory --------------------------------------------------------------------------------


MAX_COPIES = 64


def copies_for(operand_bytes: int, cache: int) -> int:
    """How many copies of an operand overflow the cache four times, so that each is gone when its turn comes again."""
    return max(1, min(MAX_COPIES, math.ceil(4 * cache / max(1, operand_bytes))))


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`, in float64."""
    difference = result.double().cpu() - exact.double().cpu()
    return float(difference.norm() / exact.double().norm())


# ---- records -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One contender on one case. Times in seconds; ratios are this / versus, quartiles over the rounds."""

    section: str
    shape: tuple[int, ...]  # (m, n, k), or (rows, cols)
    dtype: str
    method: str
    threads: int
    median_s: float
    best_s: float
    busy_s: float  # median processor time of all threads; over median_s: the cores that the contender had
    rounds: int
    inner: int
    ops: float  # per call, multiply and add counting as two
    bytes: float  # that a call must move at least
    copies: int  # of its operands, taken in turn
    from_memory: bool  # the copies overflow the last-level cache at least twice
    limit: str | None = None  # which measured limit bounds it: memory or compute
    limit_share: float | None = None  # the time which that limit allows, over the median
    error: float | None = None  # relative to float64
    versus: str | None = None
    ratio: tuple[float, float, float] | None = None
    busy_ratio: tuple[float, float, float] | None = None  # the same of processor time

    @property
    def case(self) -> str:
        m, *rest = self.shape
        sizes = f"m={m} {rest[0]}x{rest[1]}" if len(rest) == 2 else "x".join(map(str, self.shape))
        return f"{self.section} {sizes} {self.dtype}, threads={self.threads}"

    @property
    def tops(self) -> float:
        return self.ops / self.median_s / 1e12

    @property
    def gbs(self) -> float:
        return self.bytes / self.median_s / 1e9


def timed(timing: Timing, timings: Mapping[str, Timing], versus: str | None) -> dict[str, Any]:
    """The fields of a Row that come from its timing."""
    fields: dict[str, Any] = {
        "median_s": timing.median,
        "best_s": timing.best,
        "busy_s": statistics.median(timing.busy),
        "rounds": len(timing.samples),
        "inner": timing.inner,
    }
    if versus in timings:
        other = timings[versus]
        fields["versus"] = versus
        fields["ratio"] = paired_ratio(timing.samples, other.samples)
        fields["busy_ratio"] = paired_ratio(timing.busy, other.busy)
    return fields


@dataclass
class Record:
    """One run of one family: what goes to the JSON file."""

    family: str
    machine: dict[str, Any]
    limits: list[dict[str, Any]] = field(default_factory=list)  # one per thread count
    rows: list[Row] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # contender -> why
    started: str = field(default_factory=lambda: datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for row, values in zip(self.rows, data["rows"], strict=True):
            values.update(tops=row.tops, gbs=row.gbs)
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def write(self, folder: Path) -> Path:
        """FOLDER/<family>-<time>.json, whole or not at all; earlier runs stay, as history."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.started[:19].replace(":", "").replace("-", "")
        path = folder / f"{self.family}-{stamp}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json() + "\n")
        partial.replace(path)
        return path


# ---- tables --------------------------------------------------------------------------------------------------------


def format_time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


COMPARISON = ("time / that of", "quartiles", "cpu", "cores")


def comparison(row: Row) -> tuple[str, ...]:
    """The cells under COMPARISON."""
    cores = f"{row.busy_s / row.median_s:.1f}"
    if row.ratio is None or row.busy_ratio is None:
        return "", "", "", cores
    low, middle, high = row.ratio
    return f"{middle:.2f} {row.versus}", f"{low:.2f}-{high:.2f}", f"{row.busy_ratio[1]:.2f}", cores


def print_skipped(console: Console, record: Record) -> None:
    for name, reason in record.skipped.items():
        console.print(f"skipped: {name}: {reason}", markup=False)  # a reason may name an extra: octavo[hf]


def print_table(
    console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> None:
    """A table whose first column names its rows. Where the console is too narrow for all columns, they continue in
    further tables below, which name the rows again: no figure is cut."""
    rows = list(rows)
    widths = [max(cell_len(cells[i]) for cells in (headings, *rows)) + 2 for i in range(len(headings))]
    parts: list[list[int]] = [[]]
    for i in range(1, len(headings)):
        if parts[-1] and widths[0] + sum(widths[j] for j in (*parts[-1], i)) > console.width:
            parts.append([])
        parts[-1].append(i)
    console.print(title, markup=False, highlight=False, style="italic")
    for part in parts:
        table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column(headings[0], overflow="fold")
        for i in part:
            table.add_column(headings[i], justify="right", overflow="fold")
        for cells in rows:
            table.add_row(*(escape(cells[i]) for i in (0, *part)))
        console.print(table)
    if caption:
        console.print(caption, markup=False, highlight=False)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """One case's rows as a table."""
    headings = ("contender", "median", "best", "TOP/s", "GB/s", "of limit", "rel. error", *COMPARISON)
    print_table(console, rows[0].case, headings, map(_cells, rows))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        format_time(row.median_s),
        format_time(row.best_s),
        f"{row.tops:.3f}" if row.ops else "",
        f"{row.gbs:.1f}",
        "" if row.limit_share is None else f"{row.limit_share:.0%} {row.limit}",
        "" if row.error is None else f"{row.error:.2e}",
        *comparison(row),
    )
