"""The layers of a model that have adapters, or can have some."""

from __future__ import annotations

from torch import nn

from ..core.linears import is_conv1d
from ..core.linears import is_linear as plain_linear
from ..core.low_bit import LowBitLinear
from ..core.targets import parts_of_adapters, read_by_torch
from ..core.targets import unwrapped as unwrapped
from .linear import LoRALinear

Names = dict[nn.Module, list[str]]  # every layer, with all names that it has in the model


def linear_layers(model: nn.Module) -> Names:
    """`LoRALinear` layers, and linear layers that can become such."""
    fused = read_by_torch(model) | parts_of_adapters(model)
    inner = {id(module) for layer in model.modules() if isinstance(layer, LoRALinear) for module in layer.modules()}
    found: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_bare = isinstance(module, LowBitLinear) or plain_linear(module) or is_conv1d(module)
        if isinstance(module, LoRALinear) or (is_bare and id(module) not in inner | fused):
            found.setdefault(module, []).append(name)
    return found


def adapted_layers(model: nn.Module) -> dict[LoRALinear, list[str]]:
    found = {layer: names for layer, names in linear_layers(model).items() if isinstance(layer, LoRALinear)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapters; octavo.add_lora or octavo.load_adapter gives it some"
        )
    return found
