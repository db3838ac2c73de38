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
    """A module whose buffers keep their dtypes: `.to(dtype)`, `.half()` and the like change only its parameters."""

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # Moves follow fn; dtype changes stop at the parameters. A scale that went through fp16 would be another weight.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
