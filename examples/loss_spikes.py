"""Why AdamW's loss spikes, and what cures it (arXiv 2304.13013, section 3): a vision transformer on Fashion-MNIST.

AdamW divides by the root of u, its mean of squared gradients, which remembers 1 / (1 - beta2) steps. Where the learning
signal grows suddenly, u is out of date: RMS = sqrt(mean(g^2 / max(u, eps^2))) of a tensor, usually about 1, is far
above it, and the step is too large. Here the signal grows by hand: the loss counts `weight` for `change` steps, and
fully from then on. That alone changes no loss (those shown are never weighted), and an AdamW whose u were up to date
would not notice. All contenders start from the same weights and see the same batches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import octavo
import torch
import typer
from common import DIVERGED, MakeOptimizer, Run, Schedule, console, parameters, train
from report import OUT, show, write
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from vision_transformer import DATA, data_errors, make_task

ABOVE = 3.2  # standard deviations: a loss this far above the mean is a spike
SMOOTH = 10  # losses in the means that tell whether a training has recovered


@dataclass(frozen=True)
class Constant(Schedule):
    """The learning rate: up to `peak` in `warmup` steps, and there it stays."""

    def __call__(self, step: int) -> float:
        return self.peak * min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True)
class Signal:
    """What is done to the gradients: the loss's weight before step `change`, then clipping (0: none)."""

    change: int
    weight: float
    clip: float = 0.0


@dataclass
class Gauge:
    """Hooks of one optimizer: `signal` before a step; after it, what is noted of it."""

    signal: Signal
    embedding: Tensor
    norm: list[float] = field(default_factory=list)  # of all gradients, before clipping
    rms: list[float] = field(default_factory=list)  # of the embedding, of the gradients that the step used

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(self.norm) < self.signal.change:  # as if the loss had been multiplied
            torch._foreach_mul_([p.grad for p in params], self.signal.weight)
        self.norm.append(nn.utils.clip_grad_norm_(params, self.signal.clip or math.inf).item())

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rms.append(rms(optimizer, self.embedding))


def rms(optimizer: Any, param: Tensor) -> float:
    """RMS of a parameter's last step: what the optimizer says itself, or from its state and the gradient. The second
    moment kept in 8 bit is rounded by then."""
    if hasattr(optimizer, "rms"):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return next(float(value) for p, value in zip(params, optimizer.rms(), strict=True) if p is param)
    state, group, grad = optimizer.state[param], optimizer.param_groups[0], param.grad
    assert grad is not None
    if "exp_avg_sq" in state:
        u = state["exp_avg_sq"]
    else:
        codes, absmax = state["exp_avg_sq_root"], state["exp_avg_sq_root_absmax"]
        u = octavo.dequantize_blockwise(codes, absmax, signed=False).square()
    u = u / (1 - group["betas"][1] ** float(state["step"]))
    return float((grad.square() / u.clamp(min=group["eps"] ** 2)).mean().sqrt())


def contenders(signal: Signal, clip: float, beta2: float, low: float) -> tuple[dict[str, MakeOptimizer], list[Gauge]]:
    """The optimizers by name, and the list that gets a gauge of each one made."""
    from octavo.optim import AdamW8bit, StableAdamW, StableAdamW8bit

    gauges: list[Gauge] = []

    def watched(kind: Any, beta: float = beta2, limit: float = 0.0) -> MakeOptimizer:
        def make(model: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = kind(model.parameters(), betas=(0.9, beta))
            gauge = Gauge(replace(signal, clip=limit), model.patch.weight)
            gauges.append(gauge)
            optimizer.register_step_pre_hook(gauge.before)
            optimizer.register_step_post_hook(gauge.after)
            return optimizer

        return make

    made = {
        "AdamW": watched(torch.optim.AdamW),
        f"AdamW, clip {clip:g}": watched(torch.optim.AdamW, limit=clip),
        f"AdamW, beta2 {low:g}": watched(torch.optim.AdamW, beta=low),
        "StableAdamW": watched(StableAdamW),
        "AdamW8bit": watched(AdamW8bit),
        "StableAdamW8bit": watched(StableAdamW8bit),
    }
    return made, gauges


# ---- what came of it -----------------------------------------------------------------------------------------------


@dataclass
class Spike:
    """A run's losses around the change. Steps are counted from it: 0 is the first one at full weight."""

    optimizer: str
    seed: int
    mean: float  # of the losses before the change: as many as there are after it, if there are as many
    std: float
    largest: float  # loss after the change
    at: int
    above: int  # losses after the change that are more than 3.2 standard deviations above the mean
    recovered: int | None  # from here on, means of 10 losses are less than 1 above it; None: not in these steps
    rms_before: float  # the embedding's largest, of the same steps
    rms_after: float

    @property
    def rise(self) -> float:
        return self.largest - self.mean


def spike(run: Run, gauge: Gauge, change: int, steps: int) -> Spike:
    begin = max(0, 2 * change - steps)
    before, after = run.train[begin:change] or [math.nan], run.train[change:]
    mean, std = statistics.fmean(before), torch.tensor(before, dtype=torch.float64).std(correction=0).item()
    largest = max(after, key=lambda loss: loss if math.isfinite(loss) else math.inf, default=math.nan)
    means = [statistics.fmean(after[i : i + SMOOTH]) for i in range(len(after) - SMOOTH + 1)]
    high = [i for i, value in enumerate(means) if not value <= mean + std]
    back = high[-1] + 1 if high else 0
    return Spike(
        run.optimizer,
        run.seed,
        mean,
        std,
        largest,
        at=after.index(largest) if after else 0,
        above=sum(not loss <= mean + ABOVE * std for loss in after),
        recovered=back if run.diverged_at is None and back < len(means) else None,
        rms_before=max(gauge.rms[begin:change], default=math.nan),
        rms_after=max(gauge.rms[change:], default=math.nan),
    )


def show_spikes(spikes: Sequence[Spike], seeds: int) -> None:
    table = Table(title="after the change: the largest loss - the mean loss before", box=SIMPLE_HEAD)
    table.add_column("optimizer", no_wrap=True)
    for heading in (*(f"seed {seed}" for seed in range(seeds)), "losses above", "recovered after", "RMS"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(one.optimizer for one in spikes):
        own = [one for one in spikes if one.optimizer == name]
        back = ", ".join("never" if one.recovered is None else str(one.recovered) for one in own)
        above, largest = ", ".join(str(one.above) for one in own), max(one.rms_after for one in own)
        table.add_row(name, *(f"{one.rise:+.3f}" for one in own), above, back, f"{largest:.1f}")
    console.print(table)
    console.print(
        f"losses above: how many are more than {ABOVE} standard deviations above the mean before, by seed; recovered "
        f"after: steps until means of {SMOOTH} stay within 1; RMS: the patch embedding's largest of all seeds"
    )


def plot(runs: Sequence[Run], gauges: Sequence[Gauge], signal: Signal, path: Path) -> None:
    """Losses above, the embedding's RMS below, around the change: means over the seeds, and every seed faintly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, height_ratios=(3, 2), layout="constrained")
    begin = max(0, signal.change - 50)
    for number, name in enumerate(dict.fromkeys(run.optimizer for run in runs)):
        own = [(run.train, gauge.rms) for run, gauge in zip(runs, gauges, strict=True) if run.optimizer == name]
        label = name + (" (RMS of rounded states)" if name == "AdamW8bit" else "")
        for axis, curves in zip((above, below), zip(*own, strict=True), strict=True):
            style: dict[str, Any] = {"color": f"C{number}", "ls": "--" if name.endswith("8bit") else "-"}
            for values in curves:
                axis.plot(range(begin, len(values)), values[begin:], **style, lw=0.5, alpha=0.3)
            means = [statistics.fmean(values) for values in zip(*curves, strict=False)]
            axis.plot(range(begin, len(means)), means[begin:], **style, lw=1.3, label=label)
    shown = [loss for run in runs for loss in run.train[begin:] if loss < DIVERGED]
    if shown:
        above.set_ylim(0.9 * min(shown), 1.05 * max(shown))
    above.set(ylabel="loss, nats", title=f"the loss counts {signal.weight:g} before step {signal.change}, then 1")
    above.legend()
    below.set_yscale("log")
    below.axhline(1, color="black", lw=0.5)
    below.set(xlabel="step", ylabel="RMS of the patch embedding")
    for axis in (above, below):
        axis.axvline(signal.change, color="black", lw=0.5, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def details(spikes: Sequence[Spike], gauges: Sequence[Gauge]) -> Mapping[str, Any]:
    """For the JSON file: of every run, in the order of its "runs"."""
    return {
        "spikes": [
            {**asdict(one), "rise": one.rise, "embedding_rms": gauge.rms, "gradient_norm": gauge.norm}
            for one, gauge in zip(spikes, gauges, strict=True)
        ]
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST's four idx files, gzipped or not.")] = DATA,
    steps: Annotated[int, typer.Option(min=4, help="Steps of each training.")] = 400,
    change: Annotated[int, typer.Option(min=2, help="The first step whose loss counts fully.")] = 300,
    weight: Annotated[float, typer.Option(help="What the loss counts before.")] = 0.01,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with its own weights and batches.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a batch.")] = 256,
    patch: Annotated[int, typer.Option(help="Side of the squares that a picture is cut into: 4, 7 or 14.")] = 14,
    width: Annotated[int, typer.Option(help="Width of the model; 4 heads. Below 64, few states are in 8 bit.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 2,
    lr: Annotated[float, typer.Option(help="Learning rate, after a warm-up of a tenth of the steps.")] = 4e-3,
    beta2: Annotated[
        float, typer.Option(help="Decay of the second moment, but for the contender named for it.")
    ] = 0.999,
    low_beta2: Annotated[float, typer.Option(help="Its decay of the second moment.")] = 0.95,
    clip: Annotated[float, typer.Option(min=0.0, help="Largest norm of the clipped contender's gradients.")] = 1.0,
    validation: Annotated[int, typer.Option(help="Pictures to judge by, of the 10,000 for testing.")] = 10000,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of octavo.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for loss_spikes.json and .png.")] = OUT,
) -> None:
    """Train a small vision transformer whose learning signal grows suddenly, with AdamW and with StableAdamW.

    It prints how far the loss rises after the change and how long it takes to recover, and writes a JSON file and a
    plot of the losses and of the patch embedding's RMS. The defaults take some minutes on one core. The data come with
    Debian's package dataset-fashion-mnist; nothing is downloaded.
    """
    settings = dict(locals())
    if change >= steps:
        raise typer.BadParameter(f"must be below the {steps} steps", param_hint="--change")
    torch.set_num_threads(threads)
    with data_errors():
        task = replace(make_task(data, batch, patch, width, layers, validation), name="loss spikes")
    console.print(f"{task.name}: {parameters(task):,} parameters")
    begin = time.perf_counter()
    signal = Signal(change, weight)
    made, gauges = contenders(signal, clip, beta2, low_beta2)
    runs = train(task, made, Constant(lr, max(1, steps // 10), steps), seeds, every=steps)
    spikes = [spike(run, gauge, change, steps) for run, gauge in zip(runs, gauges, strict=True)]
    show(task, runs, "nats")
    show_spikes(spikes, seeds)
    write(
        task,
        runs,
        settings,
        time.perf_counter() - begin,
        out,
        more=details(spikes, gauges),
        draw=lambda path: plot(runs, gauges, signal, path),
    )


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
app.command()(main)

if __name__ == "__main__":
    app()
