"""8-bit block-wise quantization beside bitsandbytes and the same in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from octavo import ops, reference
from rich.console import Console
from torch import Tensor

from . import cases, common, limits
from .common import Record, Row
from .int8 import Setting

BLOCKSIZE = 256
Call = Callable[[], Any]


def torch_quantize(x: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The same as one would write it in PyTorch: a search among the midpoints."""
    blocks = x.float().view(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(1, keepdim=True)
    return torch.bucketize(blocks / absmax, thresholds, out_int32=True).to(torch.uint8), absmax


def torch_dequantize(codes: Tensor, absmax: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values[codes.int()].view(-1, BLOCKSIZE) * absmax[:, None]).to(dtype)


def contenders(x: Tensor, skipped: dict[str, str]) -> tuple[dict[str, Call], dict[str, Call]]:
    """Quantizing x, and dequantizing what came out."""
    codes, absmax = ops.quantize_blockwise(x, BLOCKSIZE)
    values = reference.dynamic_map(True).to(x.device)
    middle = (values[1:] + values[:-1]) / 2
    quantize: dict[str, Call] = {
        "octavo": functools.partial(ops.quantize_blockwise, x, BLOCKSIZE),
        "torch, op by op": functools.partial(torch_quantize, x, middle),
    }
    dequantize: dict[str, Call] = {
        "octavo": functools.partial(ops.dequantize_blockwise, codes, absmax, x.dtype, BLOCKSIZE),
        "torch, op by op": functools.partial(torch_dequantize, codes, absmax, values, x.dtype),
    }
    try:
        import bitsandbytes.functional as peer

        theirs, state = peer.quantize_blockwise(x, blocksize=BLOCKSIZE)
        quantize["bitsandbytes"] = functools.partial(peer.quantize_blockwise, x, blocksize=BLOCKSIZE)
        dequantize["bitsandbytes"] = functools.partial(peer.dequantize_blockwise, theirs, state)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        skipped["bitsandbytes"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return quantize, dequantize


@dataclass(frozen=True)
class Directions:
    """What is timed in both directions: names of the rows, who takes part, bytes of codes and scales an element."""

    names: tuple[str, str]
    contenders: Callable[[Tensor, dict[str, str]], tuple[dict[str, Call], dict[str, Call]]]
    code_bytes: float


BLOCKWISE = Directions(("quantize_blockwise", "dequantize_blockwise"), contenders, 1 + 4 / BLOCKSIZE)


def bench(
    count: int, dtype: torch.dtype, cold: bool, setting: Setting, skipped: dict[str, str], what: Directions = BLOCKWISE
) -> list[list[Row]]:
    """Rows of both directions. Cold: x comes from memory. Error: of the round trip, relative to x."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(setting.device, dtype)
    copies = common.copies_for(count * x.element_size(), common.last_level_cache()) if cold else 1
    made = [what.contenders(x.clone(), skipped) for _ in range(copies)]
    moved = count * (x.element_size() + what.code_bytes)
    error = common.relative_error(made[0][1]["octavo"](), x)
    tables = []
    for direction, name in enumerate(what.names):
        calls = {key: [pair[direction][key] for pair in made] for key in made[0][direction]}
        timings = common.time_paired(calls, setting.effort, common.clock_for(setting.device))
        tables.append(
            [
                Row(
                    name,
                    (count,),
                    common.dtype_name(dtype),
                    key,
                    setting.threads,
                    **common.timed(timing, timings, None if key == "octavo" else "octavo"),
                    ops=0.0,
                    bytes=moved,
                    copies=copies,
                    from_memory=cold,
                    limit="memory" if cold else None,
                    limit_share=moved / setting.limits.read / timing.median if cold else None,
                    error=error if key == "octavo" else None,
                )
                for key, timing in timings.items()
            ]
        )
    return tables


def bench_all(
    console: Console,
    record: Record,
    setting: Setting,
    what: Directions,
    sizes: Sequence[tuple[int, bool]],
    dtypes: Sequence[torch.dtype],
) -> None:
    for count, cold in sizes:
        for dtype in dtypes:
            for rows in bench(count, dtype, cold, setting, record.skipped, what):
                record.rows += rows
                common.print_rows(console, rows)


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON into `out` when it is given."""
    before = torch.get_num_threads()
    record = Record("blockwise", common.describe_machine(device))
    effort = common.QUICK if quick else common.FULL
    sizes = cases.BLOCKWISE_QUICK_SIZES if quick else cases.BLOCKWISE_BENCH_SIZES
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16, torch.float16)
    try:
        for thread_count in list(threads) or [before]:
            torch.set_num_threads(thread_count)
            measured = limits.measure(thread_count, device)
            record.limits.append(measured.to_dict())
            limits.print_limits(console, measured)
            with torch.inference_mode():
                setting = Setting(effort, measured, thread_count, device)
                bench_all(console, record, setting, BLOCKWISE, sizes, dtypes)
    finally:
        torch.set_num_threads(before)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)}")
    return record
