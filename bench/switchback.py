"""SwitchBack: forward and backward pass of a linear layer in training, beside 16 bits; and what quantization takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from octavo import ops
from octavo.nn import SwitchBackLinear
from rich.console import Console
from torch import Tensor, nn

from . import cases, common, limits
from .common import Effort, Record, Row
from .limits import Limits

TORCH = "torch bf16"
DEFAULT = "octavo switchback"
QUANTIZATION = "its quantizations alone"
VARIANTS = ("switchback", "memory_efficient", "vectorwise", "all_int8")
ERROR_ROWS = 64  # rows are independent, and the float64 product is the slow part


def training_step(layer: nn.Linear, x: Tensor, grad: Tensor) -> None:
    """Forward and backward for a weight that is new, as after an optimizer's step."""
    if isinstance(layer, SwitchBackLinear):
        layer._cache.drop()
    x.grad = layer.weight.grad = None
    layer(x).backward(grad)


def quantizations(weight: Tensor, x: Tensor, grad: Tensor) -> None:
    """What a step of the variant switchback quantizes: the weight both ways, x and the output's gradient by rows."""
    ops.quantize_tensorwise_transpose(weight)
    ops.quantize_rowwise(x)
    ops.quantize_rowwise(grad)


def bench_step(m: int, n: int, k: int, effort: Effort, measured: Limits, device: str) -> tuple[list[Row], str]:
    """Rows of one layer at m tokens, and a sentence on the quantizations' share."""
    make = torch.Generator().manual_seed(m + n + k)
    plain = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(n, k, generator=make) / k**0.5)
    x = torch.randn(m, k, generator=make).to(device, torch.bfloat16).requires_grad_()
    grad = torch.randn(m, n, generator=make).to(device, torch.bfloat16)
    layers: dict[str, nn.Linear] = {TORCH: plain}
    for variant in VARIANTS:
        layer = SwitchBackLinear(k, n, False, variant, device="meta", dtype=torch.bfloat16)
        layer.weight = plain.weight
        layers[f"octavo {variant}"] = layer
    calls: dict[str, list[Callable[[], object]]] = {
        name: [functools.partial(training_step, layer, x, grad)] for name, layer in layers.items()
    }
    weight = plain.weight.detach()
    calls[QUANTIZATION] = [functools.partial(quantizations, weight, x.detach(), grad)]
    timings = common.time_paired(calls, effort, common.clock_for(device))
    exact = x[:ERROR_ROWS].detach().cpu().double() @ weight.cpu().double().T
    moved = 2.0 * 2 * (m * k + n * k + m * n)  # bf16: x, weight and gradient read, their counterparts written
    peak = measured.peaks.get("int8")
    rows = []
    for name, layer in layers.items():
        versus = {TORCH: None, DEFAULT: TORCH}.get(name, DEFAULT)
        int8_products = {TORCH: 0, "octavo all_int8": 3}.get(name, 2)
        with torch.no_grad():
            error = common.relative_error(layer(x[:ERROR_ROWS]), exact)
        share = 2.0 * m * n * k * int8_products / peak / timings[name].median if peak and int8_products else None
        rows.append(
            Row(
                "training step",
                (m, n, k),
                "bf16",
                name,
                measured.threads,
                **common.timed(timings[name], timings, versus),
                ops=6.0 * m * n * k,
                bytes=moved,
                copies=1,
                from_memory=moved > 4 * common.last_level_cache(),
                limit=None if share is None else "int8 products",
                limit_share=share,
                error=error,
            )
        )
    low, middle, high = common.paired_ratio(timings[QUANTIZATION].samples, timings[DEFAULT].samples)
    return rows, f"quantization: {middle:.1%} of {DEFAULT}'s time (quartiles {low:.1%} to {high:.1%})"


def bench_transpose(rows: int, cols: int, effort: Effort, measured: Limits, device: str) -> list[Row]:
    """Both int8 forms of a weight: fused, and one after the other."""
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, cols, device=device, dtype=dtype)
        name = "octavo quantize_tensorwise_transpose"

        def apart(x: Tensor = x) -> tuple[Tensor, Tensor]:
            codes, _ = ops.quantize_tensorwise(x)
            return codes, codes.t().contiguous()

        calls: dict[str, list[Callable[[], object]]] = {
            name: [functools.partial(ops.quantize_tensorwise_transpose, x)],
            "quantize_tensorwise, then torch's transpose": [apart],
        }
        timings = common.time_paired(calls, effort, common.clock_for(device))
        moved = x.numel() * (2.0 * dtype.itemsize + 2)  # x for its absmax and again for its codes
        for method, timing in timings.items():
            result.append(
                Row(
                    "quantize and transpose",
                    (rows, cols),
                    common.dtype_name(dtype),
                    method,
                    measured.threads,
                    **common.timed(timing, timings, None if method == name else name),
                    ops=0.0,
                    bytes=moved,
                    copies=1,
                    from_memory=x.nbytes > 4 * common.last_level_cache(),
                    limit="memory",
                    limit_share=moved / measured.read / timing.median,
                )
            )
    return result


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON into `out` when it is given."""
    record = Record("switchback", common.describe_machine(device))
    effort = common.QUICK if quick else common.FULL
    before = torch.get_num_threads()
    try:
        for count in list(threads) or [before]:
            torch.set_num_threads(count)
            measured = limits.measure(count, device)
            record.limits.append(measured.to_dict())
            limits.print_limits(console, measured)
            for n, k in cases.SWITCHBACK_LAYERS:
                done = bench_transpose(n, k, effort, measured, device)
                record.rows += done
                for dtype in dict.fromkeys(row.dtype for row in done):
                    common.print_rows(console, [row for row in done if row.dtype == dtype])
                for m in cases.SWITCHBACK_QUICK_ROWS if quick else cases.SWITCHBACK_ROWS:
                    done, share = bench_step(m, n, k, effort, measured, device)
                    record.rows += done
                    common.print_rows(console, done)
                    console.print(share)
    finally:
        torch.set_num_threads(before)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)}")
    return record
