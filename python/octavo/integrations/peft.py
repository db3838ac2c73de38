"""PEFT's own LoRA on octavo's layers: ``get_peft_model(model, register(config, model))``.

PEFT knows the layers that it may adapt. `register` tells a ``LoraConfig`` about octavo's, through PEFT's mapping of
custom modules; training, saving, loading, switching and disabling adapters are then PEFT's own, and merging is exact.

```python
import peft
from octavo.integrations.peft import register

model = peft.get_peft_model(model, register(peft.LoraConfig(r=64, target_modules="all-linear"), model))

config = peft.LoraConfig.from_pretrained("./adapter")
model = peft.PeftModel.from_pretrained(model, "./adapter", config=register(config, model))
```
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..core.checks import device_of
from ..core.method import stored_methods
from ..lora.linear import dtype_of, is_linear, merged_linear
from ..lora.merging import float_dtype
from ..lora.peft_format import BASE_KEPT, shortest

__all__ = ["OctavoLoraLinear", "register"]


def register(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Let a ``LoraConfig`` adapt octavo's layers.

    ``target_modules="all-linear"`` includes them.

    Args:
        config: changed in place.
        model: that it will be used for, or a ``PeftModel`` of it; merged layers are in the dtype that it computes in.

    Returns:
        The configuration.

    Example:
        >>> import peft, torch, octavo
        >>> from octavo.integrations.peft import register
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> model = peft.get_peft_model(model, register(peft.LoraConfig(r=2, target_modules=["0"]), model))
        >>> type(model.base_model.model[0]).__name__
        'OctavoLoraLinear'
    """
    if config.target_modules == "all-linear":
        config.target_modules = _all_linear(model)
    made: Any = partial(OctavoLoraLinear, merge_dtype=float_dtype(model))
    config._register_custom_module(dict.fromkeys(stored_methods().values(), made))
    return config


def _all_linear(model: nn.Module) -> list[str]:
    """PEFT's own "all-linear" sees classes that it knows; like it, this leaves the output layer out."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    find = getattr(inner, "get_output_embeddings", None)
    head = None if find is None else find()
    chosen, modules, within = set(), [], set()
    for name, module in inner.named_modules():
        if id(module) in within:
            continue
        modules.append(name)
        if isinstance(module, BaseTunerLayer):
            within |= {id(m) for m in module.modules()}
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_linear(base) and base is not head:
            chosen.add(name)
    return shortest(chosen, modules)


class OctavoLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer over an octavo layer, which PEFT makes of one that `register` told it about.

    ``merge`` puts a `torch.nn.Linear` in the base's place, its weight the sum of the dequantized one and the adapters
    in fp32, rounded once; ``unmerge`` brings the base back to the bit.

    Example:
        >>> import peft, torch, octavo
        >>> from octavo.integrations.peft import register
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> model = peft.get_peft_model(model, register(peft.LoraConfig(r=2, target_modules=["0"]), model))
        >>> layer = model.base_model.model[0]
        >>> layer(torch.randn(2, 64)).shape, layer.active_adapters
        (torch.Size([2, 64]), ['default'])
    """

    base_layer: Any

    def __init__(
        self, base: nn.Module, adapter_name: str, *args: Any, merge_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        self._merge_dtype = merge_dtype
        super().__init__(base, adapter_name, *args, **kwargs)
        if self.fan_in_fan_out:
            raise ValueError(f"fan_in_fan_out is {self.fan_in_fan_out}; weights of octavo's layers are [out, in]")
        self._unmerged: tuple[nn.Module, ...] = ()  # the base, while another layer is in its place

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}  # plain LoRA: others, as use_dora, read the base's weight

    def resolve_lora_variant(self, **settings: Any) -> None:
        variant = super().resolve_lora_variant(**settings)
        if variant is not None:  # before PEFT 0.21, which asks lora_variants
            asked = ", ".join(name for name, value in settings.items() if value)
            raise ValueError(f"octavo's layers take plain LoRA, not {type(variant).__name__} ({asked})")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, *args: Any, **kwargs: Any) -> None:
        init = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights", True))
        if init not in BASE_KEPT:
            raise ValueError(
                f"init_lora_weights {init!r} changes the base's weights; those of octavo's layers are frozen"
            )
        super().update_layer(adapter_name, r, lora_alpha, *args, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return device_of(base_layer), None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute by the exact merged matrix. NaN and Inf are refused, as by PEFT's `safe_merge`, whatever that is."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        if biased := [name for name in names if self.lora_bias.get(name)]:
            raise ValueError(f"lora_bias of adapter {biased[0]!r} is True: it cannot be merged into octavo's layers")
        base = self._unmerged[0] if self._unmerged else self.base_layer
        merged = [*self.merged_adapters, *names]
        delta = sum((self._delta(name) for name in merged), start=torch.zeros((), device=device_of(base)))
        layer, _, _ = merged_linear(base, delta, self._merge_dtype or dtype_of(base), ", ".join(map(repr, merged)))
        self._unmerged = (base,)
        self.base_layer = layer.train(self.training)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer, self._unmerged = self._unmerged[0], ()
        self.merged_adapters.clear()

    def _delta(self, name: str) -> Tensor:
        a, b = self.lora_A[name].weight.detach().float(), self.lora_B[name].weight.detach().float()
        return torch.mul(b @ a, self.scaling[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for base in self.__dict__.get("_unmerged", ()):
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)
