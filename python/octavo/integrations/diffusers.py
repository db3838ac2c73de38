"""octavo in diffusers: ``UNet2DConditionModel.from_pretrained(path, quantization_config=OctavoConfig("nf4"))``.

As in transformers: layers are quantized while a checkpoint is read, saved by ``save_pretrained``, and read again; and
what `octavo.quantize_model` makes of a model of diffusers is recorded in its configuration. A pipeline takes
``diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": OctavoConfig("nf4")})``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..core.low_bit import LowBitLinear
from ..core.method import Method, layer_class, methods
from ..core.targets import find_targets, linears_of
from ._checkpoint import read_headers, recognized_method, state_of_headers
from .transformers import OctavoConfig, describe_layers


class _Name(str):
    """The method's name; diffusers asks for its value, as of an enumeration's."""

    @property
    def value(self) -> str:
        return str(self)


class OctavoDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Replaces the Linear layers of a model under construction by quantized ones, and fills them.

    Example:
        >>> import octavo
        >>> from octavo.integrations.diffusers import OctavoDiffusersQuantizer
        >>> OctavoDiffusersQuantizer(octavo.OctavoConfig("nf4"), pre_quantized=False).is_serializable
        True
    """

    quantization_config: OctavoConfig
    is_serializable = True
    is_trainable = True
    is_compileable = True
    _files: Sequence[str] = ()
    _targets: dict[str, list[str]]

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        quantization_config.quant_method = _Name("octavo")
        if not self.pre_quantized and not self._method.in_stream:
            name = self._method.name
            raise ValueError(
                f"{name} needs calibration data and cannot quantize a model while it is loaded: load it without "
                f"quantization_config and call octavo.quantize_model(model, method={name!r}, calibration=...)"
            )

    @property
    def _method(self) -> Method:
        return methods()[self.quantization_config.method]

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        self._files = checkpoint_files
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:  # a layer is replaced when its weight comes
            targets, _ = find_targets(model, config.skip, self._method.widest)
            self._targets = {name: target.names for target in targets for name in target.names}
            return
        headers = read_headers(self._files)
        for module, names in linears_of(model)[0].items():
            override = config.layers.get(names[0], {})
            found = state_of_headers(names[0], headers)
            method = override.get("method") or recognized_method(names[0], found, config)
            if method is None:
                continue
            cls = layer_class(method)
            described = _sizes(module) | config.layout(method) | {k: v for k, v in override.items() if k != "method"}
            state = cls.unflattened(found, described)
            described |= cls.read_from(state)
            if missing := sorted(cls.tensor_names(described) - state.keys()):
                raise ValueError(f"{names[0]}: the checkpoint has no {names[0]}.{missing[0]}")
            new = cls.from_configuration(described, module.weight.dtype)  # type: ignore[arg-type]
            if errors := cls.tensor_errors(state, described):
                raise ValueError(f"{names[0]}: {errors[0]}")
            new.fit_to(state)
            for name in names:
                model.set_submodule(name, new)

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if not self.pre_quantized:
            return leaf == "weight" and owner in self._targets
        return isinstance(layer, LowBitLinear) and leaf in layer.tensors

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def create_quantized_param(
        self, model: Any, param: Tensor, param_name: str, device: Any, state_dict: Any, *_: Any, **kwargs: Any
    ) -> None:
        owner, _, leaf = param_name.rpartition(".")  # type: ignore[assignment]
        layer = model.get_submodule(owner)
        if self.pre_quantized:  # of the file, not of param, which is in the dtype of the model
            tensor = layer.unflattened({leaf: state_dict[param_name]}, layer.configuration())[leaf]
            layer._put(leaf, tensor.to(device))
            return
        new = self._method.layer.from_configuration(_sizes(layer) | self.quantization_config.layout(), param.dtype)
        settings = self._method.Settings(**self.quantization_config.layout())
        for name, tensor in self._method.quantize_stored(param.to(device), settings).items():
            new._put(name, tensor)
        new.compute_dtype, new.bias = param.dtype, layer.bias
        for name in self._targets[owner]:
            model.set_submodule(name, new.train(layer.training))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _layers(model):
            if errors := layer.errors(layer.state_dict(), layer.configuration()):
                where = "" if self.pre_quantized else ": the checkpoint's weight holds NaN or Inf"
                raise ValueError(f"{name}: {errors[0]}{where}")
        return model

    def _dequantize(self, model: Any) -> Any:
        for name, layer in _layers(model):
            model.set_submodule(name, layer.dequantize())
        return model


def mark(model: Any) -> None:
    """Record in a model of diffusers what octavo made of its layers, for its ``save_pretrained``."""
    if not _layers(model):
        return
    model.hf_quantizer = OctavoDiffusersQuantizer(describe_layers(model, None), pre_quantized=True)
    model.is_quantized = True
    model.register_to_config(quantization_config=model.hf_quantizer.quantization_config)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowBitLinear)]


def _sizes(linear: Any) -> dict[str, Any]:
    return {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}


AUTO_QUANTIZATION_CONFIG_MAPPING["octavo"] = OctavoConfig
AUTO_QUANTIZER_MAPPING["octavo"] = OctavoDiffusersQuantizer
