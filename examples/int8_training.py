"""Linear layers that train in 8 bit (SwitchBack, arXiv 2304.13013) against 16-bit ones, side by side.

The small vision transformer of `vision_transformer` on Fashion-MNIST, under bf16 autocast with fp32 weights and AdamW.
What differs is the linear layers: torch's, whose products are then in 16 bit, or octavo's in one of their variants. All
start from the same weights and see the same batches, so that their paired difference shows what 8-bit products change.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import octavo
import torch
import typer
import vision_transformer
from common import Batch, MakeOptimizer, Run, Schedule, Score, Task, console, parameters, train
from report import OUT, paired, write
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from vision_transformer import DATA, data_errors

BASE, CONTROL = "16 bit", "32 bit"
VARIANTS = ("switchback", "memory_efficient", "vectorwise", "all_int8", "fp8")
MEASURES = ("loss", "accuracy")


def in_16_bit(model: nn.Module) -> torch.autocast:
    """Autocast, but for a model that `contenders` has marked as the control."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not getattr(model, "control", False))


def make_task(folder: Path, batch: int, patch: int, width: int, layers: int, validation: int) -> Task:
    plain = vision_transformer.make_task(folder, batch, patch, width, layers, validation)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with in_16_bit(model):
            return plain.loss(model, batch)

    def evaluate(model: nn.Module, full: bool) -> Score:
        with in_16_bit(model):
            return plain.evaluate(model, full)

    return replace(plain, name="int8 training", loss=loss, evaluate=evaluate)


def contenders(variants: Sequence[str] = VARIANTS, control: bool = False) -> dict[str, MakeOptimizer]:
    """By name, what makes a model's linear layers those of a contender, and its optimizer."""

    def sixteen(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())

    def eight(variant: str) -> MakeOptimizer:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            octavo.convert_linears(model, octavo.nn.SwitchBackLinear, variant=variant)
            return torch.optim.AdamW(model.parameters())

        return make

    def exact(model: Any) -> torch.optim.Optimizer:
        model.control = True
        return sixteen(model)

    made: dict[str, MakeOptimizer] = {BASE: sixteen, **{variant: eight(variant) for variant in variants}}
    return {**made, CONTROL: exact} if control else made


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of every contender and measure: the mean over the seeds, what that of 16 bit differs by, seed by seed, and, for
    16 bit itself, the standard deviation over the seeds. NaN where one diverged."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.optimizer for run in runs):
        row: dict[str, Any] = {"layers": name}
        for key in MEASURES:
            values = [run.final.get(key, math.nan) for run in runs if run.optimizer == name]
            row[key] = {"mean": statistics.fmean(values)}
            if name == BASE:
                finite = len(values) > 1 and all(map(math.isfinite, values))
                row[key]["std"] = statistics.stdev(values) if finite else math.nan
            else:
                differences = paired(runs, BASE, name, key)
                row[key] |= {"difference": differences, "mean_difference": statistics.fmean(differences)}
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]], seeds: int) -> None:
    for key in MEASURES:
        table = Table(title=f"validation {key}, and what is added to that of {BASE}", box=SIMPLE_HEAD)
        table.add_column("linear layers", no_wrap=True)
        for heading in (key, *(f"seed {seed}" for seed in range(seeds)), "mean"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            part = row[key]
            cells = [f"{part['mean']:.4f}"]
            if row["layers"] != BASE:
                cells += [f"{value:+.4f}" for value in (*part["difference"], part["mean_difference"])]
            table.add_row(row["layers"], *(cell.replace("+nan", "").replace("nan", "diverged") for cell in cells))
        console.print(table)
        if seeds > 1:
            console.print(f"the noise: over the seeds, {BASE} has a standard deviation of {rows[0][key]['std']:.4f}")


def main(
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST's four idx files, gzipped or not.")] = DATA,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with its own weights and batches.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a batch.")] = 128,
    patch: Annotated[int, typer.Option(help="Side of the squares that a picture is cut into: 4, 7 or 14.")] = 14,
    width: Annotated[int, typer.Option(help="Width of the model; 4 heads.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 2,
    lr: Annotated[float, typer.Option(help="Highest learning rate: warm-up of a tenth, then a cosine.")] = 4e-3,
    validation: Annotated[int, typer.Option(help="Pictures to judge by, of the 10,000 for testing.")] = 10000,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"Which layers, of {', '.join(VARIANTS)}; again for more. All by default.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also without autocast: how much rounding alone changes a run.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of octavo.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for int8_training.json and .png.")] = OUT,
) -> None:
    """Train a small vision transformer with 16-bit linear layers and with octavo's SwitchBackLinear.

    It prints validation loss and accuracy with their paired differences to 16 bit, and writes a JSON file and a plot.
    The defaults take some minutes on one core. The data come with Debian's package dataset-fashion-mnist; nothing is
    downloaded.
    """
    settings = dict(locals())
    chosen = tuple(dict.fromkeys(variant or VARIANTS))
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: it is one of {', '.join(VARIANTS)}", param_hint="--variant")
    torch.set_num_threads(threads)
    with data_errors():
        task = make_task(data, batch, patch, width, layers, validation)
    console.print(f"{task.name}: {parameters(task):,} parameters")
    begin = time.perf_counter()
    schedule = Schedule(lr, max(1, steps // 10), steps)
    runs = train(task, contenders(chosen, control), schedule, seeds, every=max(1, steps // 12))
    rows = summary(runs)
    show(rows, seeds)
    write(task, runs, settings, time.perf_counter() - begin, out, more={"summary": rows})


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
app.command()(main)

if __name__ == "__main__":
    app()
