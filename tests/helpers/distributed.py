"""Two processes on one machine, for the tests of distributed training."""

from __future__ import annotations

import os
import socket
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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    method = "spawn" if torch.cuda.is_initialized() else "fork"  # a fork is sooner there, but has no GPU
    mp.start_processes(_enter, (body, world, port, arguments), nprocs=world, start_method=method)


def _enter(rank: int, body: Callable[..., None], world: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        body(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
