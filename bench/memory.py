"""Peak memory of one call beyond its inputs and its result, each contender in a process of its own.

`python -m octavo.bench.int8 METHOD DEVICE` prints one JSON object. On a CPU the resident set is what counts: torch's
allocator does not see what a kernel takes from malloc. The first call warms up; then free heap pages go back to the
system, so that a reused page cannot hide a buffer, the kernel's high-water mark is reset, and the second call counts.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import common
from .common import Call

# k is small, so that an int32 [m, n] (128 MiB) stands far above anything of m x k.
SHAPE = (4096, 8192, 512)
METHODS = (
    "octavo t=0",
    "octavo t=6, outliers",
    "torch bf16",
    "torch._int_mm",
    "bitsandbytes t=6, outliers",
    "torchao int8 dynamic",
)


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (highest since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_cpu(call: Call) -> int:
    """Bytes by which the resident set rose above its start while `call` ran, its result included."""
    call()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return peak - before


def peak_extra_cuda(call: Call) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def extra(call: Callable[[], Tensor], device: str) -> int:
    """Bytes that a call takes in this process beyond its inputs and its result."""
    peak = (peak_extra_cuda if torch.device(device).type == "cuda" else peak_extra_cpu)(call)
    result = call()
    return peak - result.numel() * result.element_size()


def measure_all(device: str = "cpu") -> list[dict[str, Any]]:
    """One subprocess per contender; one that fails gives its error instead of figures."""
    found = []
    for method in METHODS:
        command = [sys.executable, "-m", "octavo.bench.int8", method, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            found.append({"method": method, "shape": SHAPE, "error": reason})
    return found


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    m, n, k = SHAPE
    title = f"peak memory beyond inputs and result, m={m} {n}x{k} bf16; int32 m x n is {4 * m * n >> 20} MiB"
    cells = [
        (row["method"], f"{row['extra_bytes'] / 2**20:.1f}", f"{row['extra_per_mk']:.1f}")
        for row in rows
        if "error" not in row
    ]
    common.print_table(console, title, ("contender", "MiB", "bytes per m*k"), cells)
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']}: {row['error']}", markup=False)
