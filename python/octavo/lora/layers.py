"""The layers of a model that have adapters, or can have some."""

from __future__ import annotations

from torch import nn

from ..core.low_bit import LowBitLinear
from ..core.targets import read_by_torch
from .linear import LoRALinear

Names = dict[nn.Module, list[str]]  # every layer, with all names that it has in the model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's module and DistributedDataParallel: its names are those in files."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def linear_layers(model: nn.Module) -> Names:
    """`LoRALinear` layers, and linear layers that can become such."""
    fused = read_by_torch(model)
    inner = {id(module) for layer in model.modules() if isinstance(layer, LoRALinear) for module in layer.modules()}
    found: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_bare = type(module) is nn.Linear or isinstance(module, LowBitLinear)
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
