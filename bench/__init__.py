"""octavo's benchmarks: `octavo bench FAMILY`. How they measure, and how to read them, is in README.md beside this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAMILIES = ("int8", "model", "blockwise", "optim", "spqr", "sparse", "nf4", "switchback")


def main(
    family: str | None = None,
    *,
    quick: bool = False,
    out: str | Path | None = None,
    threads: int | Sequence[int] | None = None,
    device: str = "cpu",
    console: Any = None,
) -> dict[str, Any]:
    """Run one family, or all of them, and return each one's record.

    Args:
        family: one of `FAMILIES`; None runs all.
        quick: fewer shapes or models, and rounds (a minute or two each).
        out: folder for FAMILY-<time>.json (and PNGs where a family draws any); None only prints.
        threads: thread counts to measure one after another; None takes torch's.
        device: "cpu" or "cuda".
        console: of rich, for the tables; None prints.

    Raises:
        ValueError: unknown family, or a thread count below 1.
    """
    import importlib

    from rich.console import Console

    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: {', '.join(FAMILIES)}")
    counts = [threads] if isinstance(threads, int) else list(threads or ())
    if any(count < 1 for count in counts):
        raise ValueError(f"threads must be at least 1, got {counts}")
    folder = None if out is None else Path(out)
    console = Console() if console is None else console
    records = {}
    for name in FAMILIES if family is None else (family,):
        module = importlib.import_module(f".{name}", __name__)
        records[name] = module.run(console, quick=quick, out=folder, threads=counts, device=device)
    return records
