"""Every operator needs a fake besides its kernel: a function that tells torch.compile shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  registers the operators
from .no_cuda import CUDA_BUILT, refuse_cuda

_registered: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake of op `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _registered[name] = function
        torch.library.register_fake(f"octavo::{name}", function)
        if not CUDA_BUILT:
            refuse_cuda(name)
        return function

    return register


def register_fakes(namespace: str) -> None:
    """Give the operators of another namespace with the same schemas (a test build's) the same fakes.

    Example:
        >>> import octavo
        >>> octavo.ops.register_fakes("octavo_simt")  # doctest: +SKIP
    """
    for name, function in _registered.items():
        torch.library.register_fake(f"{namespace}::{name}", function)


def check_devices(op: str, *tensors: Tensor | None) -> None:
    """The fakes also serve meta tensors, and one meta argument is enough to get here: a CPU x with a meta weight must
    not become an empty result."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise RuntimeError(f"{op}: all tensors must be on one device, got {' and '.join(devices)}")
