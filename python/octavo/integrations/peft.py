"""PEFT on octavo's layers: ``get_peft_model(model, LoraConfig(...))``, as on any model.

octavo's layers are `torch.nn.Linear` to PEFT, whose adapters of every kind train on them. Its LoRA layer over one of
them is `OctavoLoraLinear`, whose merging is exact. For other kinds of adapters (IA3, AdaLoRA, VeRA, OFT, ...) merging
raises, as they would write into the quantized weight; ``layer.dequantize()`` gives one that they can be merged into.

```python
import peft

model = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules="all-linear", use_dora=True))
model = peft.PeftModel.from_pretrained(model, "./adapter")
```
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..core.checks import device_of
from ..core.linears import is_stored_transposed, store_transposed
from ..core.low_bit import LowBitLinear
from ..lora.linear import exact_weight, rounded_linear
from ..lora.peft_format import BASE_KEPT

__all__ = ["OctavoLoraLinear", "register"]

TESTED = ((0, 18), (0, 21))  # the first and the last minor version of PEFT that this was tried with

_PREPARE = "prepare_model_for_kbit_training"


def connect(module: Any) -> None:
    """Let PEFT make `OctavoLoraLinear` layers, and let its preparation for training see that a model is quantized."""
    found = re.match(r"(\d+)\.(\d+)", module.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not TESTED[0] <= version <= TESTED[1]:
        first, last = (".".join(map(str, v)) for v in TESTED)
        warnings.warn(
            f"octavo was tried with PEFT {first} to {last} and leaves {module.__version__} as it is: its adapters work "
            "on octavo's layers, and merging them raises",
            stacklevel=2,
        )
        return
    if getattr(LoraModel._create_new_module, "_of_octavo", False):
        return
    make = LoraModel._create_new_module

    @functools.wraps(make)
    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, LowBitLinear) or kwargs.get("parameter_name") is not None:
            return make(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]
        if getattr(lora_config, "fan_in_fan_out", False):
            warnings.warn("fan_in_fan_out is for weights [in, out]; octavo's are [out, in]: it is off", stacklevel=2)
            lora_config.fan_in_fan_out = False
            kwargs.pop("fan_in_fan_out", None)
        # Before 0.21 PEFT gave the settings one by one, from 0.19 on it gives the configuration, too.
        config = {} if version < (0, 19) else {"config": lora_config}
        return OctavoLoraLinear(target, adapter_name, **config, **kwargs)

    create_new_module._of_octavo = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
    prepare: Any = peft.prepare_model_for_kbit_training

    @functools.wraps(prepare)
    def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        model = prepare(model, *args, **kwargs)
        wanted = args[0] if args else kwargs.get("use_gradient_checkpointing", True)
        if wanted and any(isinstance(m, LowBitLinear) for m in model.modules()):
            _switch_checkpointing_on(model, (args[1:2] or (kwargs.get("gradient_checkpointing_kwargs"),))[0])
        return model

    for name, loaded in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and vars(loaded).get(_PREPARE) is prepare:
            setattr(loaded, _PREPARE, prepare_model_for_kbit_training)


def _switch_checkpointing_on(model: Any, options: dict[str, Any] | None) -> None:
    """What PEFT does with models that transformers itself calls quantized."""
    options = options or {}
    if options.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if callable(enable := getattr(model, "gradient_checkpointing_enable", None)):
        enable(**({"gradient_checkpointing_kwargs": options} if options else {}))


def register(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration as it is: PEFT knows octavo's layers by itself, as soon as octavo is imported.

    Example:
        >>> import peft, torch, octavo
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        >>> type(model.base_model.model[0]).__name__
        'OctavoLoraLinear'
    """
    return config


class OctavoLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer over an octavo layer: LoRA, rsLoRA, DoRA and what else PEFT's own has.

    ``merge`` puts a `torch.nn.Linear` in the base's place, its weight the sum of the dequantized one and the adapters
    in fp32, rounded once to the base's `compute_dtype`; ``unmerge`` brings the base back to the bit. An initialisation
    that changes the base's weight (PiSSA, OLoRA, LoftQ, ...) quantizes it again, with the base's settings.

    Raises:
        ValueError: a merged weight with NaN or Inf; `lora_bias`, which cannot be merged; an initialisation that changes
            the weight of a base that is not quantized without calibration data.

    Example:
        >>> import peft, torch, octavo
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
        >>> layer = model.base_model.model[0]
        >>> layer(torch.randn(2, 64)).shape, layer.active_adapters
        (torch.Size([2, 64]), ['default'])
    """

    base_layer: Any
    _by_peft = False  # whether PEFT's own merging is at work, on a float layer in the base's place

    def __init__(self, base: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._unmerged: tuple[Any, ...] = ()  # the base, while another layer is in its place
        super().__init__(base, adapter_name, *args, **kwargs)
        if self.fan_in_fan_out:
            raise ValueError(f"fan_in_fan_out is {self.fan_in_fan_out}; weights of octavo's layers are [out, in]")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        init = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights", True))
        if init in BASE_KEPT:
            super().update_layer(adapter_name, *args, **kwargs)
            return
        base = self.base_layer
        linear = base.dequantize(torch.float32)
        before = linear.weight.detach().clone()
        self.base_layer = linear
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        finally:
            self.base_layer = base
        if not torch.equal(linear.weight.detach(), before):
            self.base_layer = base.quantize_like(linear).to(device_of(base))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute by the exact merged matrix. NaN and Inf are refused, as by PEFT's `safe_merge`, whatever that is."""
        if self._by_peft:  # which unmerges and merges again to see the weight without one adapter
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        if biased := [name for name in names if self.lora_bias.get(name)]:
            raise ValueError(f"lora_bias of adapter {biased[0]!r} is True: it cannot be merged into octavo's layers")
        before, held, merged = self.base_layer, list(self.merged_adapters), [*self.merged_adapters, *names]
        base, adapters = self._unmerged[0] if self._unmerged else before, ", ".join(map(repr, merged))
        self.base_layer = rounded_linear(exact_weight(base, adapters), None, torch.float32, adapters)
        self.merged_adapters.clear()
        self._by_peft = True
        try:
            super().merge(safe_merge=False, adapter_names=merged)
            layer = rounded_linear(self.base_layer.weight.detach(), base.bias, base.compute_dtype, adapters)
            if is_stored_transposed(base):
                store_transposed(layer)
        except BaseException:
            self.base_layer, self.merged_adapters[:] = before, held
            raise
        finally:
            self._by_peft = False
        self._unmerged, self.base_layer = (base,), layer.train(self.training)

    def unmerge(self) -> None:
        if self._by_peft:
            super().unmerge()
        elif not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self.base_layer, self._unmerged = self._unmerged[0], ()
            self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s * B @ A`` in fp32, whatever the adapter is in."""
        a, b = self.lora_A[adapter].weight.detach().float(), self.lora_B[adapter].weight.detach().float()
        return torch.mul(b @ a, self.scaling[adapter])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for base in self.__dict__.get("_unmerged", ()):
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)


connect(peft)
