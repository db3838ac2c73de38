"""The picture of a run: loss of every step, smoothed, and perplexity of the text that was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_SMOOTHING = 0.9  # the decay of the running mean


def smoothed(losses: Sequence[float], smoothing: float = _SMOOTHING) -> list[float]:
    """Exponential running mean without the bias of its beginning: ``m_t / (1 - s^t)``, as Adam's."""
    out: list[float] = []
    mean = 0.0
    for count, loss in enumerate(losses, 1):
        mean = smoothing * mean + (1.0 - smoothing) * loss
        out.append(mean / (1.0 - smoothing**count))
    return out


def draw(path: Path, title: str, losses: Sequence[float], perplexities: Mapping[int, float]) -> None:
    """Write a PNG. losses: of steps 1, 2, ...; perplexities: by the number of steps before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    blue, orange = "#0072B2", "#D55E00"  # Okabe and Ito
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color=blue, alpha=0.35, linewidth=0.8, label="training loss, each step")
    left.plot(steps, smoothed(losses), color=blue, linewidth=1.8, label="training loss, smoothed")
    left.set_xlabel("step")
    left.set_ylabel("loss, nats per token", color=blue)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = left.twinx()
    right.plot(
        list(perplexities), list(perplexities.values()), "o--", color=orange, markersize=5, label="held-out perplexity"
    )
    right.set_ylabel("held-out perplexity", color=orange)
    for step, value in perplexities.items():
        right.annotate(f"{value:.2f}", (step, value), (0, 7), textcoords="offset points", ha="center", fontsize="small")
    handles = [*left.get_lines(), *right.get_lines()]
    left.legend(handles=handles, loc="upper right", fontsize="small")
    left.spines["top"].set_visible(False)
    right.spines["top"].set_visible(False)
    left.set_title(title, fontsize="medium")
    try:
        figure.savefig(path, dpi=120, format="png")
    finally:
        plt.close(figure)
