"""Quantizing one layer by SpQR: the compiled loop beside the same in PyTorch, and what the rest of the work takes.

    python -m octavo.bench.spqr_quantize --sizes 1024 4096

Both sides get the same factor and do the same products between blocks of columns; what differs is the loop inside a
block. Their codes are compared. Runs alternate; the median and the range of each are printed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from octavo import ops, reference
from octavo.spqr import Hessian, SpQRConfig, factorize, quantize_weight
from rich.console import Console
from torch import Tensor

from .common import print_table

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fit(low: Tensor, high: Tensor, most: float, most_ranges: float) -> tuple[Tensor, Tensor]:
    far = torch.maximum(low, -high) > most_ranges * (high - low)
    low, high = torch.where(far, low.clamp_max(0.0), low), torch.where(far, high.clamp_min(0.0), high)
    scale = (high - low) / most
    return scale, -low / scale.clamp_min(1e-9)


def _loss(group: Tensor, diagonal: Tensor, scale: Tensor, zero: Tensor, most: float) -> Tensor:
    code = (group / scale.clamp_min(1e-9) + zero).round().clamp(0.0, most)
    return ((group - scale * (code - zero)) / diagonal).square()


def torch_columns(
    weight: Tensor,
    factor: Tensor,
    threshold: float,
    bits: int,
    group_size: int,
    stats_group_size: int = 16,
    scale_bits: int = 0,
    zero_bits: int = 0,
    leave_one_out: bool = True,
) -> Parts:
    """`octavo.ops.spqr_quantize_columns` as one would write it in PyTorch: whole columns at a time, all refits of a
    group in one batch, the second level over all tiles at once."""
    n, k = weight.shape
    most, w = float((1 << bits) - 1), weight.clone()
    codes, residual = torch.empty(n, k, dtype=torch.uint8), torch.zeros(n, k, dtype=torch.float16)
    error = torch.empty(n, k)
    statistics_of: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    far = 1.0 if scale_bits else 16.0
    others = ~torch.eye(group_size, dtype=torch.bool)
    diagonal = factor.diagonal()
    for begin in range(0, k, group_size):
        group, d = w[:, begin : begin + group_size], diagonal[begin : begin + group_size]
        low, high = group.amin(1), group.amax(1)
        if leave_one_out and threshold < float("inf"):
            now = _loss(group, d, *(s[:, None] for s in _fit(low, high, most, far)), most)
            without = group[:, None, :].masked_fill(~others, float("inf")).amin(2)
            up_to = group[:, None, :].masked_fill(~others, -float("inf")).amax(2)
            then = _loss(group[:, None, :], d, *(s[..., None] for s in _fit(without, up_to, most, far)), most)
            likely = now.sum(1, keepdim=True) - (then * others).sum(2) > threshold
            none = likely.all(1)
            low = torch.where(none, low, group.masked_fill(likely, float("inf")).amin(1))
            high = torch.where(none, high, group.masked_fill(likely, -float("inf")).amax(1))
        scale, zero = _fit(low, high, most, far)
        records = []
        for i, (values, width) in enumerate(((scale, scale_bits), (zero, zero_bits))):
            if not width:
                statistics_of[i].append(values.half())
                values.copy_(values.half())
                continue
            tiles = values.view(-1, stats_group_size)
            top = float((1 << width) - 1)
            step = ((tiles.amax(1) - tiles.amin(1)) / top).half().float().clamp_min(1e-7)
            offset = (-tiles.amin(1) / step).half().float()
            code = (tiles / step[:, None] + offset[:, None]).round().clamp(0.0, top)
            statistics_of[i].append(code.flatten().to(torch.uint8))
            values.copy_(((code - offset[:, None]) * step[:, None]).flatten())
            records += [step.half(), offset.half()]
        if records:
            statistics_of[2].append(torch.stack(records, 1))
        for j in range(begin, begin + group_size):
            column = w[:, j]
            code = (column / scale.clamp_min(1e-9) + zero).round().clamp(0.0, most)
            value = scale * (code - zero)
            e = (column - value) / diagonal[j]
            out = e.square() > threshold
            residual[:, j] = torch.where(out, column - value, 0.0).half()
            e = (column - value - residual[:, j].float()) / diagonal[j]
            codes[:, j], error[:, j] = code.to(torch.uint8), e
            w[:, j + 1 :].addr_(e, factor[j, j + 1 :], alpha=-1.0)
    second = torch.stack(statistics_of[2], 1) if statistics_of[2] else torch.empty(0, k // group_size, 4).half()
    return codes, torch.stack(statistics_of[0], 1), torch.stack(statistics_of[1], 1), second, residual, error


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def layer(size: int) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, size, generator=generator) * 0.02
    weight[torch.rand(size, size, generator=generator) < 0.002] *= 10
    hessian = Hessian(size)
    scale = torch.rand(size, generator=generator) * 4 + 0.5
    hessian.add(torch.randn(2 * size, size, generator=generator) * scale)
    return weight, hessian.matrix


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--naive", action="store_true", help="also octavo's reference, column by column and refit by refit"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)

    headings = ("layer", "loop", "factor", "quantize", "times octavo's", "same codes")
    console = Console()
    for size in given.sizes:
        weight, hessian = layer(size)
        for config in (SpQRConfig(3), SpQRConfig.gptq(4, 64)):
            begin = time.perf_counter()
            factor = factorize(hessian, config.damping, config.act_order)
            seconds = time.perf_counter() - begin
            loops = {"octavo": {}, "PyTorch": {"columns": torch_columns}}
            if given.naive:
                loops["reference"] = {"columns": reference.spqr_quantize_columns}
            times: dict[str, list[float]] = {name: [] for name in loops}
            made = {}
            for _ in range(given.rounds):
                for name, options in loops.items():
                    passed, made[name] = timed(functools.partial(quantize_weight, weight, factor, config, **options))
                    times[name].append(passed)
            median = {name: statistics.median(values) for name, values in times.items()}
            cells = []
            for name, values in times.items():
                same = float((made[name].codes == made["octavo"].codes).float().mean())
                cells.append(
                    (
                        f"{size} x {size}",
                        name,
                        f"{seconds:.2f}",
                        f"{median[name]:.2f} ({min(values):.2f}-{max(values):.2f})",
                        f"{median[name] / median['octavo']:.1f}",
                        f"{same:.2%}",
                    )
                )
            title = f"SpQR of one layer, {config}, {given.threads} threads, seconds: median (range)"
            print_table(console, title, headings, cells)
    one_block(console, given.sizes, given.rounds, given.threads)


def one_block(console: Console, sizes: list[int], rounds: int, threads: int) -> None:
    """The loop alone: 128 columns of the layer, without the products between blocks and the report of the error."""
    cells = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        weight = torch.randn(size, 128, generator=generator) * 1000
        factor = torch.eye(128) + torch.randn(128, 128, generator=generator).triu(1) * 0.02
        for text, arguments in (
            ("3 bits, groups of 16 x 16", (2e5, 3, 16, 16, 3, 3)),
            ("4 bits, groups of 64", (float("inf"), 4, 64)),
        ):
            share = float((ops.spqr_quantize_columns(weight, factor, *arguments)[4] != 0).float().mean())
            loops = {"octavo": ops.spqr_quantize_columns, "PyTorch": torch_columns}
            times: dict[str, list[float]] = {name: [] for name in loops}
            for _ in range(rounds + 1):  # the first warms up
                for name, loop in loops.items():
                    times[name].append(timed(functools.partial(loop, weight, factor, *arguments))[0] * 1e3)
            shown = [f"{statistics.median(t[1:]):.2f} ({min(t[1:]):.2f}-{max(t[1:]):.2f})" for t in times.values()]
            ratio = statistics.median(times["PyTorch"][1:]) / statistics.median(times["octavo"][1:])
            cells.append((f"{size} rows, {text}, {share:.1%} outliers", *shown, f"{ratio:.0f}"))
    title = f"128 columns of it, {threads} threads, milliseconds: median (range)"
    print_table(console, title, ("settings", "octavo", "PyTorch", "times octavo's"), cells)


if __name__ == "__main__":
    main()
