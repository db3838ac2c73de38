"""octavo in transformers: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=OctavoConfig())``.

Importing this module registers the quantizer, so that a directory saved with it loads like any other checkpoint.
Weights are quantized one tensor at a time while the checkpoint is read: at most one of them is in memory unquantized.
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

from ..nn import Int8Linear, check_state, check_threshold
from ..ops import quantize_rowwise
from ..quantize import METHODS

FORMAT_VERSION = 1
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32
_DTYPES = {"I8": torch.int8, "I32": torch.int32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@register_quantization_config("octavo")
class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize a model while transformers loads it; saved in its ``config.json``.

    Args:
        method: "int8": LLM.int8() (arXiv 2208.07339).
        threshold: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; 6.0 in the paper.
        skip: full dotted names, or last components of names, of Linear layers to leave alone.
        format_version: of the saved tensors; written and checked by octavo.

    Raises:
        ValueError: an unknown method or format version, a negative, NaN or infinite threshold, an unknown argument.
    """

    def __init__(
        self,
        method: str = "int8",
        threshold: float = 6.0,
        skip: Sequence[str] = ("lm_head",),
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(f"octavo format_version {format_version!r}: this octavo reads {FORMAT_VERSION}")
        if unknown:
            raise ValueError(f"OctavoConfig has no {', '.join(sorted(unknown))}")
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        self.quant_method = "octavo"
        self.method = method
        self.threshold = check_threshold(threshold)
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.format_version = format_version


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
    """Replaces the Linear layers of a model under construction by `octavo.nn.Int8Linear` and fills them."""

    quantization_config: OctavoConfig
    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        layers = _layers_to_quantize(model, config.skip)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize (skip is {config.skip})")
        headers = _read_headers(checkpoint_files or ()) if self.pre_quantized else {}
        for name, linear in layers.items():
            dtype = linear.weight.dtype
            n, k = linear.out_features, linear.in_features
            new = Int8Linear(k, n, linear.bias is not None, config.threshold, device="meta", dtype=dtype)
            if headers:
                _match_header(new, name, model.base_model_prefix, headers)
            model.set_submodule(name, new.train(linear.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(owner), Int8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeInt8()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _int8_layers(model):
            if layer.weight.is_meta and not self.pre_quantized:
                _offload_codes(layer, name)
            errors = check_state(layer.state_dict(), layer.in_features, layer.out_features)
            if errors:
                where = "" if self.pre_quantized else ": the checkpoint's weight holds NaN or Inf"
                raise ValueError(f"{name}: {errors[0]}{where}")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in _int8_layers(model):
            model.set_submodule(name, layer.dequantize(dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are: gradients flow through the frozen int8 layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_quantized(model: Any, config: OctavoConfig) -> None:
    """Let a transformers model that `octavo.quantize_model` changed be saved by its own ``save_pretrained``.

    Args:
        model: a ``PreTrainedModel`` holding `octavo.nn.Int8Linear`.
        config: with the `skip` that makes the same layers quantized on loading.
    """
    quantizer = OctavoQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def _int8_layers(model: nn.Module) -> list[tuple[str, Int8Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Linear)]


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


def _read_headers(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (safetensors dtype, shape)."""
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


def _match_header(layer: Int8Linear, name: str, prefix: str, headers: dict[str, tuple[str, list[int]]]) -> None:
    """Check the stored tensors of a layer, and make room for kept outlier columns where it has them."""
    # A base model's checkpoint may be read into a model with a head, or the other way round.
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    stored = next((candidate for candidate in names if f"{candidate}.weight" in headers), None)
    if stored is None:
        raise ValueError(f"the checkpoint has no {name}.weight")
    state = {}
    for key in ("weight", "weight_scale", "bias", "outlier_slot", "outlier_weight"):
        dtype, shape = headers.get(f"{stored}.{key}", ("", []))
        if dtype:
            state[key] = torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float64), device="meta")
    wanted = {"weight", "weight_scale"} | ({"bias"} if layer.bias is not None else set())
    errors = check_state(state, layer.in_features, layer.out_features)
    errors += [f"the checkpoint has no {stored}.{key}" for key in sorted(wanted - state.keys())]
    if errors:
        raise ValueError(f"{stored}: {errors[0]}")
    layer.outlier_slot, layer.outlier_weight = state.get("outlier_slot"), state.get("outlier_weight")


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
