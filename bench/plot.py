"""The record as a picture: speed over m, one panel per layer and thread count, under the measured limit."""

from __future__ import annotations

from pathlib import Path

from .common import Record, Row

# Colour-blind safe (Okabe and Ito); octavo's lines are thick and solid. Seven markers, so that no pair comes twice.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#999999", "#000000", "#F0E442", "#E69F00", "#D55E00")
_MARKERS = "osD^vPX"


def speed(record: Record, folder: Path) -> Path:
    """Write FOLDER/<family>.png: TOP/s of every contender, and int8's roof from the measured limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[int, int, str, int], list[Row]] = {}
    for row in record.rows:
        if len(row.shape) == 3:
            panels.setdefault((row.threads, row.shape[1], row.dtype, row.shape[2]), []).append(row)
    if not panels:
        raise ValueError("nothing to plot: the record has no product")
    methods = list(dict.fromkeys(row.method for rows in panels.values() for row in rows))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    size = (4.6 * across + 2.8, 4.2 * down + 0.4)  # inches; the legend beside, the title above
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((threads, n, dtype, k), rows) in zip(axes.flat, panels.items(), strict=False):
        limits = next(entry for entry in record.limits if entry["threads"] in (threads, 0))
        ms = sorted({row.shape[0] for row in rows})
        item = 4 if dtype == "fp32" else 2
        roof = [min(limits["peaks"]["int8"], limits["read"] * 2 * m * n * k / (n * k + item * m * (n + k))) for m in ms]
        axis.plot(ms, [value / 1e12 for value in roof], ":", color="black", label="measured limit, int8")
        for index, method in enumerate(methods):
            points = sorted((row.shape[0], row.tops) for row in rows if row.method == method)
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker=_MARKERS[index % len(_MARKERS)],
                    color=_COLOURS[index % len(_COLOURS)],
                    linewidth=2.4 if method.startswith("octavo") else 1.0,
                    linestyle="-" if method.startswith("octavo") else "--",
                    label=method,
                )
        axis.set(title=f"{n}x{k} {dtype}, threads={threads}", xlabel="m", ylabel="TOP/s", xscale="log", yscale="log")
        axis.set_xticks(ms, [str(m) for m in ms])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    shown = {}
    for axis in axes.flat:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, line)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize="small")
    machine = record.machine
    figure.suptitle(
        f"{record.family} on {machine.get('gpu', machine['cpu'])} ({machine['isa']}), {record.started[:10]}"
    )
    path = folder / f"{record.family}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
