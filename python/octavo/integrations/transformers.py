"""octavo in transformers: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=OctavoConfig())``.

Importing this module registers the quantizer, so that a directory saved with it loads like any other checkpoint.
Weights are quantized, to int8 or 4 bits, one tensor at a time while the checkpoint is read: at most one of them is in
memory unquantized. SpQR needs calibration data, which loading has not: `octavo.quantize_model` makes such a model,
`mark_quantized` lets it be saved by its ``save_pretrained``, and from there it loads like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._kinds import KINDS, MODULES, configuration, method_of
from ..nf4 import NESTED_BLOCKSIZE, check_options, quantize_4bit
from ..nn import Int8Linear, NF4Linear, SpQRLinear, check_state, check_threshold
from ..nn_nf4 import TENSORS as NF4_TENSORS
from ..nn_nf4 import check_nf4_state
from ..nn_spqr import SpQROptions, check_spqr_state
from ..ops import quantize_rowwise
from ..spqr.weight import TENSORS

FORMAT_VERSION = 1
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32
SAFETENSORS_DTYPES = {
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
        method: "int8": LLM.int8() (arXiv 2208.07339). "nf4": 4 bits, as QLoRA (arXiv 2305.14314) has them. "spqr": SpQR
            (arXiv 2306.03078), for checkpoints that hold such layers already. In a checkpoint of nf4 or spqr a layer
            whose weight is stored in int8 or unquantized is loaded as that.
        threshold: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; 6.0 in the paper.
        skip: full dotted names, or last components of names, of Linear layers to leave alone.
        format_version: of the saved tensors; written and checked by octavo.
        bits, group_size, stats_group_size, scale_bits, zero_bits: of every SpQR layer, see `octavo.spqr.SpQRWeight`;
            3, 16, 16, 3 and 3 where they are not given. Only for "spqr".
        quant_type, blocksize, double_quant: see `octavo.quantize_4bit`; "nf4", 64 and False where they are not given.
            Only for "nf4".

    Raises:
        ValueError: an unknown method or format version, a negative, NaN or infinite threshold, an unknown argument,
            settings that octavo does not know, or of another method.
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
        quant_type: str | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
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
        of_nf4: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
        given_nf4 = {name: value for name, value in of_nf4.items() if value is not None}
        if method == "nf4":
            of_nf4.update({"quant_type": "nf4", "blocksize": 64, "double_quant": False} | given_nf4)
            check_options(of_nf4["quant_type"], of_nf4["blocksize"])
            if not isinstance(of_nf4["double_quant"], bool):
                raise ValueError(f"double_quant must be true or false, got {double_quant!r}")
            self.__dict__.update(of_nf4)
        elif given_nf4:
            raise ValueError(f"{', '.join(given_nf4)}: for method 'nf4', not {method!r}")

    @property
    def options(self) -> SpQROptions:
        """How the SpQR layers of the checkpoint are to be read."""
        return SpQROptions(*(getattr(self, name) for name in SpQROptions._fields))

    @property
    def nf4_options(self) -> tuple[str, int, bool]:
        """quant_type, blocksize and double_quant of the layers in 4 bits."""
        return self.quant_type, self.blocksize, self.double_quant


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


class _QuantizeNF4(ConversionOps):  # type: ignore[misc]
    """One Linear weight, as read from a checkpoint, to the tensors of an `NF4Linear`.

    A NaN or Inf makes its block's scale NaN; the check after loading names the layer.
    """

    def __init__(self, quant_type: str, blocksize: int, double_quant: bool) -> None:
        self.options = (quant_type, blocksize, double_quant)

    def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            quantized = quantize_4bit(weight, *self.options)
            scale, span = quantized.absmax, quantized.blocksize
            if quantized.nested_absmax is not None:
                scale, span = quantized.nested_absmax, span * NESTED_BLOCKSIZE
            if len(bad := (~weight.isfinite()).flatten().nonzero().flatten()):
                scale[bad // span] = torch.nan
            tensors = zip(NF4_TENSORS, quantized.tensors(), strict=True)
            out |= {name.removesuffix("weight") + leaf: t for leaf, t in tensors if t is not None}
        return out


@register_quantizer("octavo")
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the Linear layers of a model under construction by `octavo.nn.Int8Linear`, `NF4Linear` or `SpQRLinear`,
    and fills them."""

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
        layers = _layers_to_quantize(model, config.skip, _MAX_K if config.method == "int8" else None)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize (skip is {config.skip})")
        headers = _headers_of(config, checkpoint_files or ()) if self.pre_quantized else {}
        leaves = ("codes", "weight") if config.method == "spqr" else ("weight",)
        for name, linear in layers.items():
            stored = _stored_name(name, model.base_model_prefix, leaves, headers) if headers else None
            new = _new_layer(linear, stored, config, headers)
            if new is not None:
                model.set_submodule(name, new.train(linear.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(owner), MODULES)

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        return _QuantizeNF4(*config.nf4_options) if config.method == "nf4" else _QuantizeInt8()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _quantized_layers(model):
            if not self.pre_quantized and layer.weight.is_meta:
                _offload_codes(layer, name, self.get_quantize_ops())
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
        model: a ``PreTrainedModel`` holding `octavo.nn.Int8Linear`, `NF4Linear` or `SpQRLinear`.
        config: with the `skip` that makes the same layers quantized on loading; for `NF4Linear` ``OctavoConfig("nf4",
            quant_type=..., blocksize=...)``, for `SpQRLinear` ``OctavoConfig("spqr", **layer.options._asdict())``. With
            these two, there may be `Int8Linear` and unquantized layers beside.

    Raises:
        ValueError: a layer whose options are not those of the configuration.
    """
    for name, layer in _quantized_layers(model):
        fits, wanted = True, {}
        if isinstance(layer, SpQRLinear):
            fits, wanted = config.method == "spqr" and layer.options == config.options, layer.options._asdict()
        elif isinstance(layer, NF4Linear):
            wanted = {"quant_type": layer.quant_type, "blocksize": layer.blocksize}
            fits = config.method == "nf4" and config.nf4_options[:2] == (layer.quant_type, layer.blocksize)
        if not fits:
            options = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
            raise ValueError(
                f"{name} needs OctavoConfig(method={method_of(layer)!r}, {options}), got {config.to_dict()}"
            )
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
        frozen = {name: p for name, p in layer._parameters.items() if p is not None and not p.is_floating_point()}
        for name, tensor in (*layer._buffers.items(), *frozen.items()):
            if tensor is not None and tensor.numel() and not tensor.is_meta:
                place = (tensor.device, tensor.untyped_storage().data_ptr())
                if place in seen:
                    setattr(layer, name, nn.Parameter(tensor.clone(), False) if name in frozen else tensor.clone())
                seen.add(place)


def _quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MODULES)]


def _layers_to_quantize(model: Any, skip: Iterable[str], widest: int | None) -> dict[str, nn.Linear]:
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
        and (widest is None or module.in_features <= widest)
    }


# ---- what a saved checkpoint holds, before any of it is loaded ------------------------------------------------------


def _headers_of(config: OctavoConfig, files: Sequence[str]) -> _Headers:
    headers: _Headers | None = getattr(config, "headers", None)  # of tensors in memory: see _bitsandbytes_models
    return _read_headers(files) if headers is None else headers


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
    if config.method == "spqr" and stored is None:
        raise ValueError("an SpQR checkpoint is loaded from safetensors files; there are none")
    method = config.method if stored is None else _stored_method(stored, config, headers)
    if method == "spqr":
        return _new_spqr_layer(linear, str(stored), config, headers)
    if method == "nf4":
        return _new_nf4_layer(linear, stored, config, headers)
    if method is None:
        return None
    n, k, dtype = linear.out_features, linear.in_features, linear.weight.dtype
    int8 = Int8Linear(k, n, linear.bias is not None, config.threshold, device="meta", dtype=dtype)
    if stored is not None:
        names = ("weight", "weight_scale", "bias", "outlier_slot", "outlier_weight")
        state = _stored_state(int8, stored, names, {"weight", "weight_scale"}, headers)
        _raise_first(stored, check_state(state, k, n))
        int8.outlier_slot, int8.outlier_weight = state.get("outlier_slot"), state.get("outlier_weight")
    return int8


def _stored_method(stored: str, config: OctavoConfig, headers: _Headers) -> str | None:
    """How the checkpoint has this layer: None for unquantized. In an int8 one that octavo wrote, all are in int8."""
    if config.method == "int8" and not hasattr(config, "headers"):
        return "int8"
    if f"{stored}.codes" in headers:
        return "spqr"
    dtype = headers[f"{stored}.weight"][0]
    if config.method == "nf4" and (dtype == "U8" or f"{stored}.absmax" in headers):
        return "nf4"
    return "int8" if dtype == "I8" else None


def _new_spqr_layer(linear: nn.Linear, stored: str, config: OctavoConfig, headers: _Headers) -> SpQRLinear:
    n, k = linear.out_features, linear.in_features
    dtype, has_bias = linear.weight.dtype, linear.bias is not None
    spqr = SpQRLinear(k, n, has_bias, *config.options, device="meta", dtype=dtype)
    state = _stored_state(spqr, stored, (*TENSORS, "bias"), {"codes"}, headers)
    _raise_first(stored, check_spqr_state(state, k, n, config.options))
    spqr._buffers.update({name: state.get(name) for name in TENSORS})
    return spqr


def _new_nf4_layer(linear: nn.Linear, stored: str | None, config: OctavoConfig, headers: _Headers) -> NF4Linear:
    """With what double quantization the checkpoint has, if it has the layer."""
    n, k = linear.out_features, linear.in_features
    quant_type, blocksize, double_quant = config.nf4_options
    if stored is not None:
        double_quant = f"{stored}.nested_absmax" in headers or f"{stored}.offset" in headers
    options = (quant_type, blocksize, double_quant)
    nf4 = NF4Linear(k, n, linear.bias is not None, *options, device="meta", dtype=linear.weight.dtype)
    if stored is not None:
        wanted = {"weight", "absmax"} | ({"nested_absmax", "offset"} if double_quant else set())
        state = _stored_state(nf4, stored, (*NF4_TENSORS, "bias"), wanted, headers)
        _raise_first(stored, check_nf4_state(state, k, n, quant_type, blocksize))
    return nf4


def _stored_state(
    layer: Any, stored: str, names: Iterable[str], wanted: set[str], headers: _Headers
) -> dict[str, Tensor]:
    """The tensors of a layer as the checkpoint has them, without their values."""
    state = {}
    for name in names:
        dtype, shape = headers.get(f"{stored}.{name}", ("", []))
        if dtype:
            state[name] = torch.empty(shape, dtype=SAFETENSORS_DTYPES.get(dtype, torch.float64), device="meta")
    wanted = wanted | ({"bias"} if layer.bias is not None else set())
    _raise_first(stored, [f"the checkpoint has no {stored}.{name}" for name in sorted(wanted - state.keys())])
    return state


def _raise_first(stored: str, errors: list[str]) -> None:
    if errors:
        raise ValueError(f"{stored}: {errors[0]}")


def _offload_codes(layer: Any, name: str, quantize: ConversionOps) -> None:
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
    for key, tensor in quantize.convert({f"{name}.weight": weight}).items():
        if getattr(layer, key.rpartition(".")[2]).is_meta:  # the others stay in memory
            offload_weight(tensor, key, files.save_folder, files.index)
