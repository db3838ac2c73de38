"""Helpers that the differentiable functions of all families share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype where autocast is on, as for `torch.nn.functional.linear`."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    # Autocast leaves float64 and integers alone; so here, and the op refuses them.
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype is not torch.float64 else x


def needs_grad(*tensors: Tensor | None) -> bool:
    # In forward mode too the call must go through the Function: it has no jvp and says so, where the bare operator
    # would drop the tangent and give a derivative of zero.
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return as_rows(grad).sum(0, dtype=torch.float32).to(dtype)
