"""Step counters and norms of many tensors, by device and without synchronisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from . import _state


def by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(t.device, []).append(t)
    return found


def advance(counters: list[Tensor], found: Tensor | None) -> None:
    """One step on, or back where found_inf is not 0."""
    for device, group in by_device(counters).items():
        if found is not None:
            back = (found.to(device, non_blocking=True).reshape(()) != 0).double()
            torch._foreach_sub_(group, [back] * len(group))
        elif device.type == "cpu":  # one tensor instead of as many as there are counters
            torch._foreach_add_(group, torch.tensor(1.0, dtype=torch.float64), alpha=1.0)
        else:
            torch._foreach_add_(group, 1)


def total_norm(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The norm of all gradients, shards of other processes included; sums in float64, no synchronisation."""
    total: Tensor | None = None
    meshes: dict[tuple[Any, Any], list[Tensor]] = {}
    plain: list[Tensor] = []
    for param, grad in pairs:
        if _state.is_dtensor(param):
            p = cast(Any, param)
            meshes.setdefault((p.device_mesh, p.placements), []).append(grad)
        else:
            plain.append(grad)
    sums = [_squares(grads) for grads in by_device(plain).values()]
    for (mesh, placements), grads in meshes.items():
        sums.append(over_shards(_squares(grads), (mesh, placements)))
    for part in sums:
        total = part if total is None else total + part.to(total.device, non_blocking=True)
    assert total is not None
    return total.sqrt().float()


def over_shards(local: Tensor, shards: tuple[Any, tuple[Any, ...]]) -> Tensor:
    """The sum of what every process has, over the dimensions of the mesh that shard, not those that replicate: one
    all-reduce each, without synchronisation."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = shards
    kinds = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(local, mesh, kinds, run_check=False).full_tensor()


def _squares(grads: list[Tensor]) -> Tensor:
    filled = [grad for grad in grads if grad.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    return torch.stack(torch._foreach_norm(filled, 2.0, torch.float32)).double().square().sum()
