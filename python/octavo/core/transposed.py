"""Linear layers that state dicts have [in, out], as transformers' Conv1D stores its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def store_transposed(linear: nn.Linear) -> None:
    """Let state dicts have the weight [in, out], as the Conv1D that the layer was."""
    layer: Any = linear
    layer._octavo_transposed = True
    layer._register_state_dict_hook(_transpose_saved)
    layer.register_load_state_dict_pre_hook(_transpose_loaded)


def is_stored_transposed(module: nn.Module) -> bool:
    """Whether it was a Conv1D, and is stored as one where it is stored in floats."""
    return bool(getattr(module, "_octavo_transposed", False))


def _transpose_saved(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    if isinstance(weight := state.get(f"{prefix}weight"), Tensor) and weight.is_floating_point():
        state[f"{prefix}weight"] = weight.t()


def _transpose_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if isinstance(weight := state.get(f"{prefix}weight"), Tensor) and weight.is_floating_point():
        state[f"{prefix}weight"] = weight.t()
