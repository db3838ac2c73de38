"""What the examples share: optimizers trained side by side on the same batches. `report` shows what came of it.

All contenders of a seed start from the same weights, see the same batches in the same order and have the same learning
rate: the difference between two of them comes from their optimizers alone. A contender whose loss leaves the finite
numbers is stopped and shown as diverged; the others go on.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Score = dict[str, float]  # "loss", and "accuracy" where there is one

DIVERGED = 20.0  # nats: far above that of a uniform guess
console = Console()


@dataclass(frozen=True)
class Task:
    """One thing to learn. `evaluate(model, full)`: on part of the validation data for the curve, in the end on all."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[int], Iterator[Batch]]  # seed -> batches without end
    evaluate: Callable[[nn.Module, bool], Score]


@dataclass(frozen=True)
class Schedule:
    """Learning rate: up to `peak` in `warmup` steps, then down to a tenth of it by a cosine."""

    peak: float
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))


@dataclass
class Run:
    """One training. Losses are nats; `train[i]` is that of step i before its update."""

    optimizer: str
    seed: int
    train: list[float] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    final: Score = field(default_factory=dict)
    state_bytes: int = 0
    state_bytes_8bit: int = 0  # of these, in uint8
    diverged_at: int | None = None


def train(
    task: Task,
    contenders: Mapping[str, MakeOptimizer],
    schedule: Schedule,
    seeds: int,
    every: int = 100,
    clip: float = 0.0,
) -> list[Run]:
    """Train all contenders in lockstep, seed by seed; evaluate each `every` steps and in the end.

    clip: the largest norm of a step's gradients, larger ones are scaled to it; 0 leaves them alone.
    """
    runs: list[Run] = []
    with _progress(schedule.steps * seeds) as advance:
        for seed in range(seeds):
            torch.manual_seed(seed)
            start = task.model()
            models = {name: copy.deepcopy(start) for name in contenders}
            optimizers = {name: make(models[name]) for name, make in contenders.items()}
            going = {name: Run(name, seed) for name in contenders}
            runs += going.values()
            batches = task.batches(seed)
            for step in range(schedule.steps):
                batch = next(batches)
                for name, run in going.items():
                    if run.diverged_at is None:
                        _step(task, models[name], optimizers[name], schedule(step), batch, run, clip)
                        if (step + 1) % every == 0 and run.diverged_at is None:
                            run.valid.append((step + 1, _evaluate(task, models[name], full=False)["loss"]))
                advance(f"seed {seed}", going.values())
            for name, run in going.items():
                run.state_bytes, run.state_bytes_8bit = state_bytes(optimizers[name])
                if run.diverged_at is None:
                    run.final = _evaluate(task, models[name], full=True)
                    if not math.isfinite(run.final["loss"]):
                        run.diverged_at, run.final = schedule.steps, {}
    return runs


def _step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, batch: Batch, run: Run, clip: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = task.loss(model, batch)
    value = loss.item()
    run.train.append(value)
    if not value < DIVERGED:  # also NaN
        run.diverged_at = len(run.train)
        return
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def _evaluate(task: Task, model: nn.Module, full: bool) -> Score:
    model.eval()
    with torch.inference_mode():
        score = task.evaluate(model, full)
    model.train()
    return score


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of all the state's tensors, and of those in 8 bit."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors), sum(t.nbytes for t in tensors if t.dtype is torch.uint8)


def parameters(task: Task) -> int:
    return sum(p.numel() for p in task.model().parameters())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, Iterable[Run]], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=total)

        def advance(what: str, runs: Iterable[Run]) -> None:
            losses = [statistics.fmean(run.train[-20:]) for run in runs if run.diverged_at is None]
            span = f"{min(losses):.3f} to {max(losses):.3f}" if losses else "-"
            progress.update(bar, advance=1, description=f"{what}, training loss {span}")

        yield advance
