"""A run over the products of low-bit weights at a few sizes: what the families spqr and nf4 share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import cases, common, int8, limits, plot
from .common import Record
from .int8 import Method, Problem, Setting

LAYERS = ("4096x4096", "11008x4096")


def run(
    family: str,
    methods: Sequence[Method],
    console: Console,
    quick: bool,
    out: Path | None,
    threads: Sequence[int],
    device: str,
    before_products: Callable[[Console, Record, Setting, bool], None] | None = None,
) -> Record:
    """Measure, print as it goes, and write JSON and PNG into `out` when it is given."""
    record = Record(family, common.describe_machine(device))
    before = torch.get_num_threads()
    try:
        for count in list(threads) or [before]:
            torch.set_num_threads(count)
            measured = limits.measure(count, device)
            record.limits.append(measured.to_dict())
            limits.print_limits(console, measured)
            setting = Setting(common.QUICK if quick else common.FULL, measured, count, device, methods)
            layers = cases.QUICK_LAYERS if quick else {name: cases.BENCH_LAYERS[name] for name in LAYERS}
            with torch.inference_mode():
                if before_products is not None:
                    before_products(console, record, setting, quick)
                for m, n, k in cases.gemm_shapes(cases.QUICK_ROWS, layers):
                    done = int8.bench_linear(Problem(m, n, k, torch.bfloat16, device), setting, record.skipped)
                    record.rows += done
                    common.print_rows(console, done)
    finally:
        torch.set_num_threads(before)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)} and {plot.speed(record, out)}")
    return record
