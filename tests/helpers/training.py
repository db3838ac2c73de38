"""What the tests of optimizers share: small parameters, gradients, training."""

from __future__ import annotations

import torch
from octavo import optim

OPTIMIZERS = [getattr(optim, name) for name in optim.__all__ if not name.startswith(("Optimizer", "Paged"))]
SHAPES = ((64, 300), (5000,), (16, 8, 3, 3), (7,), ())


def parameters(device: str = "cpu", dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give_gradients(params: list[torch.nn.Parameter], generator: torch.Generator, scale: float = 1.0) -> None:
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, generator)
        optimizer.step()


def one(count: int = 4096, value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((count,), value, dtype=dtype))
