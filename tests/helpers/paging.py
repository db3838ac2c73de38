"""What the tests of paged optimizers share."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from octavo import optim
from training import parameters

PAGED = [name for name in optim.__all__ if name.startswith("Paged")]
SHAPES = ((64, 300), (5000,), (16, 8, 3, 3), (7,), (), (0, 5), (4096,), (90, 70))


def many(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    return parameters(device, dtype, SHAPES)


def mapped(folder: Path) -> int:
    """How many files of the folder this process has mapped."""
    text = Path("/proc/self/maps").read_text()
    return len({line.split()[4] for line in text.splitlines() if f" {folder}/" in line})


def opened(folder: Path) -> int:
    found = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(name.startswith(f"{folder}/") for name in found)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: optim.Optimizer8bit, b: optim.Optimizer8bit) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and set(mine["state"]) == set(theirs["state"])
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    for number, entry in mine["state"].items():
        other = theirs["state"][number]
        assert set(entry) == set(other)
        for key, value in entry.items():
            same = torch.equal(value.cpu(), other[key].cpu())
            assert value.dtype is other[key].dtype and same, (number, key)


def run_python(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)
