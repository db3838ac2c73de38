"""The layers of a transformers model under construction, before and after its checkpoint is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from torch import nn

from ..core.linears import from_conv1d, is_conv1d, is_linear, is_stored_transposed
from ..core.low_bit import LowBitLinear
from ..core.method import layer_class
from ..lora.linear import LoRALinear
from ._checkpoint import Stored


def sizes_of(linear: Any) -> dict[str, Any]:
    if is_conv1d(linear):
        return {"in_features": linear.nx, "out_features": linear.nf, "bias": True}
    return {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}


def like(linear: Any, new: LowBitLinear) -> LowBitLinear:
    """A new layer, to compute in the dtype of the one whose place it takes."""
    new.compute_dtype = linear.weight.dtype
    new._octavo_transposed = is_conv1d(linear) or is_stored_transposed(linear)
    return new


def _with_prefix(model: Any, name: str) -> tuple[str, str, str]:
    """A layer's name, and what it is where a base model is read into one with a head, or the other way round."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def check_adapters(stored: Stored, config: Any, model: Any) -> None:
    """ValueError unless the checkpoint's adapters are those of the configuration."""
    wanted = {
        f"{name}.lora_{letter}.{adapter}"
        for layer, given in config.adapters.items()
        for name in _with_prefix(model, layer)
        for adapter in given["adapters"]
        for letter in "AB"
    }
    found = {name for name in stored.tensors if ".lora_A." in name or ".lora_B." in name}
    if foreign := sorted(found - wanted):
        raise ValueError(f"the checkpoint has {foreign[0]}, of which quantization_config says nothing")
    for layer, given in config.adapters.items():
        for adapter in given["adapters"]:
            for letter in "AB":
                if not any(f"{n}.lora_{letter}.{adapter}" in found for n in _with_prefix(model, layer)):
                    raise ValueError(f"the checkpoint has no {layer}.lora_{letter}.{adapter}")


def wrap(model: nn.Module, adapters: Mapping[str, Any]) -> None:
    """Give layers the adapters that a configuration names, without values."""
    modules = dict(model.named_modules())
    for name, given in adapters.items():
        found = next((n for n in _with_prefix(model, name) if n in modules), None)
        if found is None:
            raise ValueError(f"quantization_config has adapters of {name}, which {type(model).__name__} lacks")
        base: Any = modules[found]
        if not (is_linear(base) or is_conv1d(base)):
            raise ValueError(f"quantization_config has adapters of {name}, which is a {type(base).__name__}")
        if is_conv1d(base):  # the weight is read as it is stored, [in, out], and turned at the end
            base = from_conv1d(base)
            base.weight = nn.Parameter(base.weight.detach().t())
        model.set_submodule(found, LoRALinear.on_meta(base, given["adapters"], given["active"]))


def stored_layer(name: str, linear: Any, stored: Stored, config: Any) -> LowBitLinear | None:
    """The module that takes the place of `linear`, on the meta device, with room for what the checkpoint has; None: it
    stays."""
    override: Mapping[str, Any] = next(
        (config.layers[n] for n in _with_prefix(stored.model, name) if n in config.layers), {}
    )
    method = override.get("method") or stored.method_of(name, config)
    if method is None:
        return None
    cls, dtype = layer_class(method), linear.weight.dtype
    described = sizes_of(linear) | config.layout(method) | {k: v for k, v in override.items() if k != "method"}
    state = cls.unflattened(stored.state(name, (*cls.tensors, "bias")), described)
    described |= cls.read_from(state)
    if missing := sorted(cls.tensor_names(described) - state.keys()):
        raise ValueError(f"{name}: the checkpoint has no {name}.{missing[0]}")
    new = cls.from_configuration(described, dtype)
    if errors := cls.tensor_errors(state, described):
        raise ValueError(f"{name}: {errors[0]}")
    new.fit_to(state)
    return like(linear, new)


def offload_codes(model: Any, layer: Any, name: str, quantize: Any) -> None:
    """Put the codes of a layer on disk where transformers left the unquantized weight.

    A weight that is offloaded to disk is read from the checkpoint's own file at every call, whatever was made of it
    while loading.
    """
    from transformers.integrations.accelerate import offload_weight

    hooks = getattr(layer._hf_hook, "hooks", [layer._hf_hook])
    files = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    entry = files.index[f"{name}.weight"]
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        weight = file.get_tensor(entry["weight_name"])
    if not weight.is_floating_point():
        return
    if bad := weight.numel() - int(weight.isfinite().sum()):
        raise ValueError(f"{name}: {bad} of {weight.numel()} of the checkpoint's weights are NaN or Inf")
    for key, tensor in quantize.convert({f"{name}.weight": weight}, model=model).items():
        if getattr(layer, key.rpartition(".")[2]).is_meta:  # the others stay in memory
            offload_weight(tensor, key, files.save_folder, files.index)
