"""What the examples show of their runs: a table, a JSON file and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import octavo
import torch
from common import DIVERGED, Run, Task, console
from rich.box import SIMPLE_HEAD
from rich.table import Table

OUT = Path("octavo-examples")


def paired(runs: Sequence[Run], one: str, other: str, key: str = "loss") -> list[float]:
    """final(other) - final(one), seed by seed; NaN where one of them diverged."""
    final = {(run.optimizer, run.seed): run.final.get(key, math.nan) for run in runs}
    return [final[other, seed] - final[one, seed] for seed in sorted({run.seed for run in runs})]


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.optimizer for run in runs))


def _keys(runs: Sequence[Run]) -> list[str]:
    return next((list(run.final) for run in runs if run.final), ["loss"])


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def show(task: Task, runs: Sequence[Run], unit: str) -> None:
    """A table per measure: for every optimizer a row of its values, then one of the differences to the first one."""
    names, seeds = _names(runs), len({run.seed for run in runs})
    packed = any(run.state_bytes_8bit for run in runs)
    for key in _keys(runs):
        what = f"validation {key}" + (f", {unit}" if key == "loss" else "")
        table = Table(title=f"{task.name}: {what}", box=SIMPLE_HEAD)
        table.add_column("optimizer", no_wrap=True)
        for heading in (*(f"seed {seed}" for seed in range(seeds)), "mean", *(["state, MB"] if packed else [])):
            table.add_column(heading, justify="right", no_wrap=True)
        for name in names:
            own = [run for run in runs if run.optimizer == name]
            values = [run.final.get(key, math.nan) for run in own]
            state = [f"{own[0].state_bytes / 1e6:.2f}"] if packed else []
            table.add_row(name, *map(_number, [*values, statistics.fmean(values)]), *state)
            if name != names[0]:
                differences = paired(runs, names[0], name, key)
                cells = [f"{value:+.4f}" for value in [*differences, statistics.fmean(differences)]]
                table.add_row(f"  - {names[0]}", *(cell.replace("+nan", "") for cell in cells), style="bold")
        console.print(table)


def write(
    task: Task,
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    seconds: float,
    folder: Path,
    more: Mapping[str, Any] | None = None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """NAME.json and NAME.png in `folder`; NAME is the task's with underscores. more: for the JSON file; draw: another
    plot than `plot`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / task.name.replace(" ", "_")
    names = _names(runs)
    record = {
        "schema": 1,
        "task": task.name,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "seconds": round(seconds, 1),
        "machine": machine(),
        "paired": {
            f"{name} - {names[0]}": {key: paired(runs, names[0], name, key) for key in _keys(runs)}
            for name in names[1:]
        },
        "runs": [asdict(run) for run in runs],
        **(more or {}),
    }
    path.with_suffix(".json").write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")
    if draw is None:
        plot(task, runs, path.with_suffix(".png"))
    else:
        draw(path.with_suffix(".png"))
    console.print(f"written: {path}.json, {path}.png; {seconds:.0f} s in all")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"octavo": octavo.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def plot(task: Task, runs: Sequence[Run], path: Path) -> None:
    """Training loss (running mean) and validation loss above, their paired differences to the first optimizer below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = _names(runs)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    first = {run.seed: run for run in runs if run.optimizer == names[0]}
    width = max(1, max(len(run.train) for run in runs) // 25)
    for run in runs:
        number = names.index(run.optimizer)
        style: dict[str, Any] = {"color": f"C{number}", "lw": 1, "ls": "-" if number == 0 else "--"}
        label = run.optimizer if run.seed == runs[0].seed else None
        above.plot(*_smooth(run.train, width), **style, alpha=0.4)
        above.plot(*zip(*run.valid, strict=True) if run.valid else ((), ()), **style, marker=".", label=label)
        if run.diverged_at is not None:
            above.plot(
                run.diverged_at, 1, "x", color=f"C{number}", transform=above.get_xaxis_transform(), clip_on=False
            )
        if number:
            base = first[run.seed]
            differences = [b - a for a, b in zip(base.train, run.train, strict=False)]
            below.plot(*_smooth(differences, width), **style, alpha=0.4)
            pairs = [(step, b - a) for (step, a), (_, b) in zip(base.valid, run.valid, strict=False)]
            below.plot(*zip(*pairs, strict=True) if pairs else ((), ()), **style, marker=".")
    usual = sorted(value for run in runs for value in run.train if value < DIVERGED)
    if usual:
        above.set_ylim(0.95 * usual[0], 1.05 * usual[int(0.98 * (len(usual) - 1))])
    above.set(ylabel="loss, nats", title=f"{task.name}: validation (dots), training (means of {width}, faint)")
    above.legend()
    if any(run.diverged_at is not None for run in runs):
        below.set_yscale("symlog", linthresh=0.01)
    below.axhline(0, color="black", lw=0.5)
    below.set(xlabel="step", ylabel=f"difference to {names[0]}, nats")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    ends = range(width, len(values) + 1, width)
    return [end - width // 2 for end in ends], [statistics.fmean(values[end - width : end]) for end in ends]
