"""Account for the memory that fine-tuning holds: weights, adapters, gradients, optimizer states."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import evaluate


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one way to fine-tune, activations aside.

    Attributes:
        name: of the way.
        weights: of the frozen model, or of the whole one where all of it is trained.
        adapters, gradients, optimizer: what is trained, its gradients, and the optimizer's states.
        paged: the part of `optimizer` that is in pages on the host.
        measured: of the tensors of a run, or else computed from the number of parameters.
        peak: the most memory of the process (CUDA: of the device) in the training steps, activations included; None
            where it was not measured.

    Example:
        >>> from octavo.finetune import MemoryRow
        >>> MemoryRow("mine", weights=500, adapters=10, gradients=10, optimizer=20).total
        540
    """

    name: str
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    paged: int = 0
    measured: bool = False
    peak: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer


def memory_table(parameters: int, adapters: int, run: MemoryRow | None = None) -> list[MemoryRow]:
    """Fine-tuning all of a model in fp32, LoRA on it in 16 bit, and a run beside them.

    With P `parameters` and a of `adapters`: full fine-tuning holds 4 P bytes of weights, 4 P of gradients and 8 P of
    AdamW's two moments; LoRA on a 16-bit base 2 P of weights, and 4 a, 4 a and 8 a for fp32 adapters.

    Args:
        parameters: of the model without adapters, tied ones once.
        adapters: parameters of the adapters.
        run: what `measure` found.

    Example:
        >>> from octavo.finetune import memory_table
        >>> [(row.name, row.total) for row in memory_table(1000, 10)]
        [('fp32, all weights, AdamW', 16000), ('LoRA, 16-bit base, AdamW', 2160)]
    """
    rows = [
        MemoryRow("fp32, all weights, AdamW", 4 * parameters, 0, 4 * parameters, 8 * parameters),
        MemoryRow("LoRA, 16-bit base, AdamW", 2 * parameters, 4 * adapters, 4 * adapters, 8 * adapters),
    ]
    return rows if run is None else [*rows, run]


def measure(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, peak: int | None = None) -> MemoryRow:
    """The row of a model with adapters after a step, from its tensors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(parameter.nbytes for parameter in trained)
    gradients = sum((parameter if parameter.grad is None else parameter.grad).nbytes for parameter in trained)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    paged = getattr(optimizer, "paged_bytes", lambda: 0)()
    weights = evaluate.model_bytes(model) - adapters
    return MemoryRow(name, weights, adapters, gradients, sum(s.nbytes for s in states), paged, True, peak)


class Peak:
    """Measures the peak of memory from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError, AttributeError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # reading and quantizing leave hundreds of MB that nothing uses
        with suppress(OSError):  # not Linux, or not allowed: then it is since the process began
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets what `evaluate.peak_memory` reads

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return evaluate.peak_memory()


def as_table(rows: Sequence[MemoryRow]) -> Any:
    """A `rich.table.Table`, in MB."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="memory of fine-tuning, MB", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("", max_width=26)
    for heading in ("weights", "adapters", "gradients", "optimizer", "sum", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = [row.weights, row.adapters, row.gradients, row.optimizer]
        share, peak = f"{row.total / rows[0].total:4.0%}", "" if row.peak is None else f"{row.peak / 1e6:.0f}"
        name = row.name if row.measured else f"{row.name} (computed)"
        table.add_row(name, *(f"{figure / 1e6:.1f}" for figure in figures), f"{row.total / 1e6:.1f} {share}", peak)
    return table
