"""Two processes on one machine, for the tests of distributed training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor


def full(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def in_two_processes(body: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    method = "spawn" if torch.cuda.is_initialized() else "fork"  # a fork is sooner there, but has no GPU
    with tempfile.TemporaryDirectory() as folder:  # a port could be taken by another worker of the tests
        store = f"file://{folder}/store"
        mp.start_processes(_enter, (body, world, store, arguments), nprocs=world, start_method=method)


def _enter(rank: int, body: Callable[..., None], world: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        body(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
