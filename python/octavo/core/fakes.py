"""Every operator needs a fake besides its kernel: a function that tells torch.compile shapes and dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from .. import _C  # noqa: F401  registers the operators
from .no_cuda import CUDA_BUILT, refuse_cuda

_registered: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake of op `name`. Before it answers, the operator's own checks run."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            _check(name, args, kwargs)
            return function(*args, **kwargs)

        _registered[name] = checked
        torch.library.register_fake(f"octavo::{name}", checked)
        if not CUDA_BUILT:
            refuse_cuda(name)
        return checked

    return register


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what the operator would raise for tensors of these shapes, dtypes and devices, whatever their values.

    The operator's code runs on meta tensors with kernels that do nothing (csrc/common/op.h). Sizes that are symbols
    stand for those of the example that is traced; where there is none, nothing is checked.
    """
    flat, structure = pytree.tree_flatten((args, kwargs))
    if not (tensors := [value for value in flat if isinstance(value, Tensor)]):
        return
    check_devices(name, *tensors)
    try:
        with unset_fake_temporarily(), torch._C._DisableTorchDispatch():
            values = [_on_meta(value) if isinstance(value, Tensor) else _whole(value) for value in flat]
    except _UnknownSize:
        return
    with unset_fake_temporarily():
        meta_args, meta_kwargs = pytree.tree_unflatten(values, structure)
        getattr(torch.ops.octavo_checks, name)(*meta_args, **meta_kwargs)


class _UnknownSize(Exception):
    """A symbol without an example."""


def _whole(value: Any) -> Any:
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    if value.node.hint is None:
        raise _UnknownSize
    return value.node.hint


def _on_meta(t: Tensor) -> Tensor:
    sizes, strides = [_whole(size) for size in t.shape], [_whole(stride) for stride in t.stride()]
    return torch.empty_strided(sizes, strides, dtype=t.dtype, device="meta")


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
