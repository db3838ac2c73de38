"""octavo in transformers: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=OctavoConfig())``.

Importing this module registers the quantizer, so that a directory saved with it loads like any other checkpoint.
Weights are quantized to int8 one tensor at a time while the checkpoint is read: at most one of them is in memory
unquantized. SpQR needs calibration data, which loading has not: `octavo.quantize_model` makes such a model,
`mark_quantized` lets it be saved by its ``save_pretrained``, and from there it loads like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._kinds import KINDS, MODULES, configuration, method_of
from ..nn import Int8Linear, SpQRLinear, check_state, check_threshold
from ..nn_spqr import SpQROptions, check_spqr_state
from ..ops import quantize_rowwise
from ..spqr.weight import TENSORS

FORMAT_VERSION = 1
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32
_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_Headers = dict[str, tuple[str, list[int]]]  # tensor name -> safetensors dtype, shape


@register_quantization_config("octavo")
class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize a model while transformers loads it; saved in its ``config.json``.

    Args:
        method: "int8": LLM.int8() (arXiv 2208.07339). "spqr": SpQR (arXiv 2306.03078), for checkpoints that hold such
            layers already; a layer whose weight is stored in int8 or unquantized is loaded as that.
        threshold: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; 6.0 in the paper.
        skip: full dotted names, or last components of names, of Linear layers to leave alone.
        format_version: of the saved tensors; written and checked by octavo.
        bits, group_size, stats_group_size, scale_bits, zero_bits: of every SpQR layer, see `octavo.spqr.SpQRWeight`;
            3, 16, 16, 3 and 3 where they are not given. Only for "spqr".

    Raises:
        ValueError: an unknown method or format version, a negative, NaN or infinite threshold, an unknown argument,
            numbers for SpQR that octavo does not know, or with another method.
    """

    def __init__(
        self,
        method: str = "int8",
        threshold: float = 6.0,
        skip: Sequence[str] = ("lm_head",),
        format_version: int = FORMAT_VERSION,
        bits: int | None = None,
        group_size: int | None = None,
        stats_group_size: int | None = None,
        scale_bits: int | None = None,
        zero_bits: int | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(f"octavo format_version {format_version!r}: this octavo reads {FORMAT_VERSION}")
        if unknown:
            raise ValueError(f"OctavoConfig has no {', '.join(sorted(unknown))}")
        if method not in KINDS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(KINDS)}")
        self.quant_method = "octavo"
        self.method = method
        self.threshold = check_threshold(threshold)
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.format_version = format_version
        values = (bits, group_size, stats_group_size, scale_bits, zero_bits)
        given = {name: value for name, value in zip(SpQROptions._fields, values, strict=True) if value is not None}
        if method == "spqr":
            options = SpQROptions(**given)
            options.check()
            self.__dict__.update(options._asdict())
        elif given:
            raise ValueError(f"{', '.join(given)}: for method 'spqr', not {method!r}")

    @property
    def options(self) -> SpQROptions:
        """How the SpQR layers of the checkpoint are to be read."""
        return SpQROptions(*(getattr(self, name) for name in SpQROptions._fields))


class _QuantizeInt8(ConversionOps):  # type: ignore[misc]
    """One Linear weight, as read from a checkpoint, to int8 codes and scales.

    A row with a NaN or Inf gets the scale NaN; the check after loading names the layer.
    """

    def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        out = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            out[name], out[f"{name}_scale"] = quantize_rowwise(weight)
        return out


@register_quantizer("octavo")
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the Linear layers of a model under construction by `octavo.nn.Int8Linear`, or `SpQRLinear`, and fills
    them."""

    quantization_config: OctavoConfig
    requires_calibration = False  # true of SpQR: see below, where more can be said

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.method == "spqr" and not self.pre_quantized:
            raise ValueError(
                "SpQR needs calibration data and cannot quantize a model while it is loaded: load it without "
                "quantization_config and call octavo.quantize_model(model, method='spqr', calibration=...)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        layers = _layers_to_quantize(model, config.skip)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize (skip is {config.skip})")
        headers = _read_headers(checkpoint_files or ()) if self.pre_quantized else {}
        leaves = ("codes", "weight") if config.method == "spqr" else ("weight",)
        for name, linear in layers.items():
            stored = _stored_name(name, model.base_model_prefix, leaves, headers) if headers else None
            new = _new_layer(linear, stored, config, headers)
            if new is not None:
                model.set_submodule(name, new.train(linear.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(owner), Int8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeInt8()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _quantized_layers(model):
            if isinstance(layer, Int8Linear) and layer.weight.is_meta and not self.pre_quantized:
                _offload_codes(layer, name)
            config = configuration(layer)
            errors = KINDS[str(method_of(layer))].check(layer.state_dict(), config)
            if errors:
                where = "" if self.pre_quantized else ": the checkpoint's weight holds NaN or Inf"
                raise ValueError(f"{name}: {errors[0]}{where}")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # what a configuration that was saved once holds
            dtype = getattr(torch, dtype.removeprefix("torch."))
        for name, layer in _quantized_layers(model):
            model.set_submodule(name, layer.dequantize(dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are: gradients flow through the frozen layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_quantized(model: Any, config: OctavoConfig) -> None:
    """Let a transformers model that `octavo.quantize_model` changed be saved by its own ``save_pretrained``.

    Args:
        model: a ``PreTrainedModel`` holding `octavo.nn.Int8Linear` or `SpQRLinear`.
        config: with the `skip` that makes the same layers quantized on loading; for `SpQRLinear`, which may have
            `Int8Linear` and unquantized layers beside it, ``OctavoConfig(method="spqr", **layer.options._asdict())``.

    Raises:
        ValueError: an `SpQRLinear` whose options are not those of the configuration.
    """
    for name, layer in _quantized_layers(model):
        if isinstance(layer, SpQRLinear) and (config.method != "spqr" or layer.options != config.options):
            options = ", ".join(f"{key}={value}" for key, value in layer.options._asdict().items())
            raise ValueError(f"{name} needs OctavoConfig(method='spqr', {options}), got {config.to_dict()}")
    _unshare(model)
    quantizer = OctavoQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def _unshare(model: nn.Module) -> None:
    """Give layers that hold one tensor together (a permutation, say) one each: transformers does not save it else."""
    seen: set[tuple[torch.device, int]] = set()
    for _, layer in _quantized_layers(model):
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.numel() and not buffer.is_meta:
                place = (buffer.device, buffer.untyped_storage().data_ptr())
                if place in seen:
                    layer._buffers[name] = buffer.clone()
                seen.add(place)


def _quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MODULES)]


def _layers_to_quantize(model: Any, skip: Iterable[str]) -> dict[str, nn.Linear]:
    """The same choice as `octavo.quantize_model`'s, on a model whose weights are not tied yet."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    left_alone = {key.removesuffix(".weight") for key in (*tied.keys(), *tied.values())}
    left_alone |= {*skip, *(model._keep_in_fp32_modules or ())}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name not in left_alone
        and name.rpartition(".")[2] not in left_alone
        and module.in_features <= _MAX_K
    }


# ---- what a saved checkpoint holds, before any of it is loaded ------------------------------------------------------


def _read_headers(files: Sequence[str]) -> _Headers:
    headers = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    entry = file.get_slice(name)
                    headers[name] = (entry.get_dtype(), entry.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return headers


def _stored_name(name: str, prefix: str, leaves: Sequence[str], headers: _Headers) -> str:
    """A layer's name in the checkpoint: a base model's may be read into a model with a head, or the other way round."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if any(f"{candidate}.{leaf}" in headers for leaf in leaves):
            return candidate
    raise ValueError(f"the checkpoint has no {' or '.join(f'{name}.{leaf}' for leaf in leaves)}")


def _new_layer(linear: nn.Linear, stored: str | None, config: OctavoConfig, headers: _Headers) -> nn.Module | None:
    """What takes the place of `linear`, on the meta device, with room for what the checkpoint has; None: it stays."""
    n, k, dtype = linear.out_features, linear.in_features, linear.weight.dtype
    has_bias = linear.bias is not None
    if config.method == "spqr":
        if stored is None:
            raise ValueError("an SpQR checkpoint is loaded from safetensors files; there are none")
        if f"{stored}.codes" in headers:
            spqr = SpQRLinear(k, n, has_bias, *config.options, device="meta", dtype=dtype)
            state = _stored_state(spqr, stored, (*TENSORS, "bias"), {"codes"}, headers)
            _raise_first(stored, check_spqr_state(state, k, n, config.options))
            spqr._buffers.update({name: state.get(name) for name in TENSORS})
            return spqr
        if headers[f"{stored}.weight"][0] != "I8":
            return None
    int8 = Int8Linear(k, n, has_bias, config.threshold, device="meta", dtype=dtype)
    if stored is not None:
        names = ("weight", "weight_scale", "bias", "outlier_slot", "outlier_weight")
        state = _stored_state(int8, stored, names, {"weight", "weight_scale"}, headers)
        _raise_first(stored, check_state(state, k, n))
        int8.outlier_slot, int8.outlier_weight = state.get("outlier_slot"), state.get("outlier_weight")
    return int8


def _stored_state(
    layer: Any, stored: str, names: Iterable[str], wanted: set[str], headers: _Headers
) -> dict[str, Tensor]:
    """The tensors of a layer as the checkpoint has them, without their values."""
    state = {}
    for name in names:
        dtype, shape = headers.get(f"{stored}.{name}", ("", []))
        if dtype:
            state[name] = torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float64), device="meta")
    wanted = wanted | ({"bias"} if layer.bias is not None else set())
    _raise_first(stored, [f"the checkpoint has no {stored}.{name}" for name in sorted(wanted - state.keys())])
    return state


def _raise_first(stored: str, errors: list[str]) -> None:
    if errors:
        raise ValueError(f"{stored}: {errors[0]}")


def _offload_codes(layer: Any, name: str) -> None:
    """Put the codes of a layer on disk where transformers left the unquantized weight.

    A weight that is offloaded to disk is read from the checkpoint's own file at every call, whatever was made of it
    while loading.
    """
    from transformers.integrations.accelerate import offload_weight

    hooks = getattr(layer._hf_hook, "hooks", [layer._hf_hook])
    index = next(hook.weights_map.dataset.index for hook in hooks if getattr(hook, "weights_map", None) is not None)
    entry = index[f"{name}.weight"]
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        weight = file.get_tensor(entry["weight_name"])
    if weight.dtype is torch.int8:
        return
    folder = os.path.dirname(index[f"{name}.weight_scale"]["safetensors_file"])
    codes, scale = quantize_rowwise(weight)
    if bad := int(scale.isnan().sum()):
        raise ValueError(f"{name}: {bad} of {len(scale)} rows of the checkpoint's weight hold NaN or Inf")
    offload_weight(codes, f"{name}.weight", folder, index)
    offload_weight(scale, f"{name}.weight_scale", folder, index)
