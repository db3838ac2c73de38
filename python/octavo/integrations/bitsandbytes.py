"""bitsandbytes' int8 state: `octavo.nn.Int8Linear.load_state_dict` reads it, `to_bitsandbytes_state` writes it.

bitsandbytes itself is not needed. A `Linear8bitLt` layer holds ``weight`` int8 [n, k], ``SCB`` fp32 [n] (the absmax of
each row: the weight is ``weight * SCB[:, None] / 127``), ``weight_format`` uint8 [] = 0 for row-major, and ``bias``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import Int8Linear


def to_bitsandbytes_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of an `Int8Linear`, or of a model that holds some, with the keys of bitsandbytes.

    ``SCB = weight_scale * 127``. Kept outlier columns have no counterpart there and are left out (their int8 weights
    are in `weight`), and so is the threshold, which bitsandbytes takes from its configuration. Everything that is not
    an `Int8Linear` is as in ``module.state_dict()``. Tensors are shared with the module, not copied.

    Raises:
        ValueError: there is no `Int8Linear` in it.
    """
    prefixes = [f"{name}." if name else "" for name, child in _int8_layers(module)]
    if not prefixes:
        raise ValueError(f"{type(module).__name__} holds no octavo.nn.Int8Linear")
    state: dict[str, Tensor] = module.state_dict()
    for prefix in prefixes:
        scale = state.pop(f"{prefix}weight_scale")
        state[f"{prefix}SCB"] = scale * 127.0
        state[f"{prefix}weight_format"] = torch.zeros((), dtype=torch.uint8, device=scale.device)
        state.pop(f"{prefix}outlier_slot", None)
        state.pop(f"{prefix}outlier_weight", None)
    return dict(state)


def _int8_layers(module: nn.Module) -> list[tuple[str, Int8Linear]]:
    children = module.named_modules(remove_duplicate=False)  # a shared layer is in the state under each of its names
    return [(name, child) for name, child in children if isinstance(child, Int8Linear)]
