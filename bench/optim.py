"""One step of AdamW over about 100 M parameters: octavo in 8 and 32 bits, StableAdamW, torch, bitsandbytes, torchao.

`python -m octavo.bench.optim METHOD COUNT DEVICE` prints the memory of one contender as a JSON object: bytes of state
per parameter, and the peak of a step beyond parameters, gradients and states.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import cases, common, limits, memory
from .common import Record, Row

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
Build = Callable[[list[Tensor]], torch.optim.Optimizer]


def octavo_adamw(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    import octavo

    made: torch.optim.Optimizer = octavo.optim.AdamW8bit(params, **HYPER, **options)
    return made


def paged_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    """All states in a file, or in pinned memory for a GPU: what paging costs where memory would have had room."""
    on_device = params[0].device.type != "cpu"
    return octavo_adamw(
        params,
        paged=True,
        page_dir=None if on_device else tempfile.gettempdir(),
        device_budget=None if on_device else 0,
    )


def stable_adamw(params: list[Tensor], bits: int) -> torch.optim.Optimizer:
    import octavo

    made: torch.optim.Optimizer = octavo.optim.StableAdamW(params, **HYPER, bits=bits)
    return made


def torch_adamw(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **HYPER, **options)


def bitsandbytes_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, **HYPER)
    return made


def torchao_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(params, **HYPER)
    return made


@dataclass(frozen=True)
class Method:
    name: str
    build: Build
    step_bytes: float  # per fp32 parameter: what a step must read and write
    slow: bool = False  # left out of a quick run
    gradient_reads: int = 1


DEFAULT = "octavo AdamW8bit"
METHODS = (
    Method(DEFAULT, octavo_adamw, 16 + 4 * 4 / 256),
    Method("octavo AdamW8bit, bits=32", functools.partial(octavo_adamw, bits=32), 28),
    Method("octavo AdamW8bit, paged", paged_adamw, 16 + 4 * 4 / 256),
    Method("octavo StableAdamW8bit", functools.partial(stable_adamw, bits=8), 21 + 5 * 4 / 256, gradient_reads=2),
    Method("octavo StableAdamW", functools.partial(stable_adamw, bits=32), 36, gradient_reads=2),
    Method("torch AdamW fused", functools.partial(torch_adamw, fused=True), 28),
    Method("torch AdamW foreach", functools.partial(torch_adamw, foreach=True), 28),
    Method("bitsandbytes AdamW8bit", bitsandbytes_adamw, 16 + 4 * 4 / 256),
    Method("torchao AdamW8bit", torchao_adamw, 16 + 4 * 4 / 256, slow=True),  # compiles for minutes
)


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Parameters with gradients, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        param.grad = torch.randn(shape, generator=generator).mul_(1e-2).to(device, dtype)
        params.append(param)
    return params


def bench(
    label: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    effort: common.Effort,
    measured: limits.Limits,
    device: str,
    quick: bool,
    skipped: dict[str, str],
) -> list[Row]:
    """Every contender with parameters and states of its own, in one process, in turns."""
    count = sum(math.prod(shape) for shape in shapes)
    calls: dict[str, list[common.Call]] = {}
    for method in METHODS:
        if quick and method.slow:
            skipped[method.name] = "compiles for minutes: left out of a quick run"
            continue
        try:
            step = method.build(parameters(shapes, dtype, device)).step
            step()
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            if method.name.startswith("octavo"):
                raise
            skipped[method.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        calls[method.name] = [step]
    timings = common.time_paired(calls, effort, common.clock_for(device))
    narrower = 4 - dtype.itemsize  # than the fp32 that step_bytes counts: a parameter read and written, gradients read
    moved = {method.name: count * (method.step_bytes - (2 + method.gradient_reads) * narrower) for method in METHODS}
    return [
        Row(
            f"AdamW step, {label}",
            (len(shapes), count),
            common.dtype_name(dtype),
            method.name,
            measured.threads,
            **common.timed(timings[method.name], timings, None if method.name == DEFAULT else DEFAULT),
            ops=0.0,
            bytes=moved[method.name],
            copies=1,
            from_memory=count * dtype.itemsize > 4 * common.last_level_cache(),
            limit="memory",
            limit_share=moved[method.name] / measured.read / timings[method.name].median,
        )
        for method in METHODS
        if method.name in timings
    ]


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    headings = ("contender", "median", "ns / parameter", "best", "GB/s", "of limit", *common.COMPARISON)
    cells = [
        (
            row.method,
            common.format_time(row.median_s),
            f"{row.median_s / row.shape[1] * 1e9:.2f}",
            f"{row.best_s / row.shape[1] * 1e9:.2f}",
            f"{row.gbs:.1f}",
            f"{row.limit_share:.0%}",
            *common.comparison(row),
        )
        for row in rows
    ]
    common.print_table(console, rows[0].case, headings, cells)


# ---- memory --------------------------------------------------------------------------------------------------------


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            yield value
        else:  # a tensor made of tensors: torchao's
            yield from (part for name in inner()[0] for part in _tensors(getattr(value, name)))
    elif isinstance(value, dict):
        yield from (part for item in value.values() for part in _tensors(item))


def measure_memory(name: str, count: int, device: str) -> dict[str, Any]:
    """In this process: state of one fp32 tensor, and the peak of a step beyond it."""
    method = next(candidate for candidate in METHODS if candidate.name == name)
    optimizer = method.build(parameters([(count,)], torch.float32, device))
    optimizer.step()
    seen = {part.data_ptr(): part.numel() * part.element_size() for part in _tensors(dict(optimizer.state))}
    peak = (memory.peak_extra_cuda if torch.device(device).type == "cuda" else memory.peak_extra_cpu)(optimizer.step)
    return {"method": name, "count": count, "state_per_param": sum(seen.values()) / count, "extra_bytes": peak}


def measure_all_memory(count: int, device: str, quick: bool) -> list[dict[str, Any]]:
    found = []
    for method in METHODS:
        if quick and method.slow:
            continue
        command = [sys.executable, "-m", "octavo.bench.optim", method.name, str(count), device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            found.append({"method": method.name, "count": count, "error": reason})
    return found


def print_memory(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    title = f"memory with one fp32 tensor of {rows[0]['count']:,} parameters ({rows[0]['count'] * 4 >> 20} MiB)"
    cells = [
        (row["method"], f"{row['state_per_param']:.3f}", f"{row['extra_bytes'] / 2**20:.1f}")
        for row in rows
        if "error" not in row
    ]
    common.print_table(console, title, ("contender", "state, bytes / parameter", "peak of a step, MiB"), cells)
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']}: {row['error']}", markup=False)


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON into `out` when it is given."""
    before = torch.get_num_threads()
    record = Record("optim", common.describe_machine(device))
    effort = common.QUICK if quick else common.FULL
    one = cases.OPTIM_QUICK_ONE if quick else cases.OPTIM_ONE
    many = cases.transformer_parameters(cases.OPTIM_QUICK_LAYERS if quick else cases.OPTIM_LAYERS)
    try:
        for thread_count in list(threads) or [before]:
            torch.set_num_threads(thread_count)
            measured = limits.measure(thread_count, device)
            record.limits.append(measured.to_dict())
            limits.print_limits(console, measured)
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                for label, shapes in (("one tensor", [(one,)]), (f"{len(many)} tensors", many)):
                    rows = bench(label, shapes, dtype, effort, measured, device, quick, record.skipped)
                    record.rows += rows
                    print_rows(console, rows)
    finally:
        torch.set_num_threads(before)
    record.memory = measure_all_memory(cases.OPTIM_QUICK_ONE, device, quick)
    print_memory(console, record.memory)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)}")
    return record


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
