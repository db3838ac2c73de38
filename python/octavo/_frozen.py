"""What modules with a quantized weight share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_Self = TypeVar("_Self", bound="FrozenBuffers")


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class FrozenBuffers(nn.Module):
    """A module whose buffers keep their dtypes: `.to(dtype)`, `.type(dtype)`, `.half()` and the like change only its
    parameters, and of these only floats."""

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # Moves follow fn; dtype changes stop at the parameters. A scale that went through fp16 would be another weight.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        parameters = {name: p.data for name, p in self._parameters.items() if p is not None}
        codes = {name: value for name, value in parameters.items() if not value.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        for name, value in codes.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype is not value.dtype:
                parameter.data = value.to(parameter.device)
        return self
