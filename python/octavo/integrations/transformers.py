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

from ..core.low_bit import LowBitLinear
from ..core.method import Method, find_method, layer_class, methods
from ..core.targets import SKIP, as_patterns, matches

FORMAT_VERSION = 1
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
        method: "int8": LLM.int8() (arXiv 2208.07339). "nf4" or "fp4": 4 bits, as QLoRA (arXiv 2305.14314) has them.
            "spqr": SpQR (arXiv 2306.03078), for checkpoints that hold such layers already. In a checkpoint of nf4 or
            spqr a layer whose weight is stored in int8 or unquantized is loaded as that.
        skip: patterns (as of `fnmatch`, or plain names) of layers to leave alone: full names, last components of names,
            or modules that contain the layers.
        format_version: of the saved tensors; written and checked by octavo.
        settings: what all layers have in common. int8: ``threshold``; nf4: ``quant_type``, ``blocksize``,
            ``double_quant``; spqr: ``bits``, ``group_size``, ``stats_group_size``, ``scale_bits``, ``zero_bits``. See
            the methods' ``Settings``, and `octavo.spqr.SpQRWeight`. They are attributes of the configuration.

    Raises:
        ValueError: an unknown method or format version, a bad setting, or one that the method does not have.

    Example:
        >>> from octavo import OctavoConfig
        >>> OctavoConfig("nf4", double_quant=True).double_quant
        True
        >>> OctavoConfig("nf4", bits=3)
        Traceback (most recent call last):
        ValueError: nf4 has no setting bits; it has quant_type, blocksize, double_quant
    """

    def __init__(
        self,
        method: str = "int8",
        *,
        skip: str | Iterable[str] = SKIP,
        format_version: int = FORMAT_VERSION,
        **settings: Any,
    ) -> None:
        settings.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(f"octavo format_version {format_version!r}: this octavo reads {FORMAT_VERSION}")
        found, given = find_method(method, settings)
        given = {name: value for name, value in given.items() if value is not None}
        own = methods()[found.stored]
        known = own.layout_defaults()
        beside = {name: value for other in own.beside for name, value in methods()[other].layout_defaults().items()}
        found.check_names((name for name in given if name not in beside), known=tuple(known))
        self.quant_method = "octavo"
        self.method = own.name
        self.skip = list(as_patterns("skip", skip))
        self.format_version = format_version
        for name in (own.name, *own.beside):
            defaults = methods()[name].layout_defaults()
            layout = {key: given.get(key, value) for key, value in defaults.items()}
            self.__dict__.update(methods()[name].check_layout(layout))

    def layout(self, stored: str | None = None) -> dict[str, Any]:
        """The settings that the configuration records for all layers of a method; None means its own method."""
        names = methods()[stored or self.method].layout_defaults()
        return {name: getattr(self, name) for name in names}


class _Quantize(ConversionOps):  # type: ignore[misc]
    """One Linear weight, as read from a checkpoint, to the tensors of a quantized layer."""

    def __init__(self, method: Method, settings: Any) -> None:
        self.method, self.settings = method, settings

    def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            made = self.method.quantize_stored(weight, self.settings)
            out |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in made.items()}
        return out


@register_quantizer("octavo")
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the Linear layers of a model under construction by quantized ones, and fills them.

    Example:
        >>> import octavo
        >>> from octavo.integrations.transformers import OctavoQuantizer
        >>> OctavoQuantizer(octavo.OctavoConfig("nf4"), pre_quantized=False).requires_calibration
        False
    """

    quantization_config: OctavoConfig
    requires_calibration = False  # true of some methods: see below, where more can be said

    @property
    def _method(self) -> Method:
        return methods()[self.quantization_config.method]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self._method.in_stream and not self.pre_quantized:
            name = self._method.name
            raise ValueError(
                f"{name} needs calibration data and cannot quantize a model while it is loaded: load it without "
                f"quantization_config and call octavo.quantize_model(model, method={name!r}, calibration=...)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        headers = _headers_of(config, checkpoint_files or ()) if self.pre_quantized else {}
        # Of a checkpoint the tensors say which layers are quantized; `skip` may have meant fewer when it was written.
        patterns = () if headers else config.skip
        layers = _layers_to_quantize(model, patterns, self._method.widest)
        leaves = tuple(dict.fromkeys((self._method.layer.key, "weight")))
        replaced = 0
        for name, linear in layers.items():
            left = bool(headers) and any(matches((name,), pattern) for pattern in config.skip)
            stored = _stored_name(name, model.base_model_prefix, leaves, headers, left) if headers else None
            if left and (stored is None or _recognized(stored, self._method, headers) is None):
                continue
            new = _new_layer(linear, stored, config, headers)
            replaced += 1
            if new is not None:
                model.set_submodule(name, new.train(linear.training))
        if not replaced:
            raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize (skip is {config.skip})")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(owner), LowBitLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._method, self._method.Settings(**self.quantization_config.layout()))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _quantized_layers(model):
            if not self.pre_quantized and layer.qweight.is_meta:
                _offload_codes(layer, name, self.get_quantize_ops())
            errors = layer.errors(layer.state_dict(), layer.configuration())
            if errors:
                where = "" if self.pre_quantized else ": the checkpoint's weight holds NaN or Inf"
                raise ValueError(f"{name}: {errors[0]}{where}")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a configuration that was saved once holds these
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
        model: a ``PreTrainedModel`` holding quantized layers.
        config: with the `skip` that makes the same layers quantized on loading, and the settings that its layers have:
            for `NF4Linear` ``OctavoConfig("nf4", quant_type=..., blocksize=...)``, for `SpQRLinear`
            ``OctavoConfig("spqr", **layer.options._asdict())``. With these two, there may be `Int8Linear` and
            unquantized layers beside.

    Raises:
        ValueError: a layer whose options are not those of the configuration.

    Example:
        >>> import octavo, transformers
        >>> from octavo.integrations.transformers import mark_quantized
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
        >>> report = octavo.quantize_model(model, "nf4", progress=False)
        >>> mark_quantized(model, octavo.OctavoConfig("nf4"))
        >>> model.save_pretrained("model-nf4")
        >>> again = transformers.AutoModelForCausalLM.from_pretrained("model-nf4")
        >>> type(again.model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """
    own = methods()[config.method]
    for name, layer in _quantized_layers(model):
        method = methods()[layer.stored_as]
        fixed = {key: value for key, value in layer.configuration().items() if key in method.layout_of_all()}
        is_there = layer.stored_as in (own.name, *own.beside)
        if not is_there or fixed != {key: getattr(config, key) for key in fixed}:
            options = "".join(f", {key}={value!r}" for key, value in fixed.items())
            raise ValueError(f"{name} needs OctavoConfig(method={layer.stored_as!r}{options}), got {config.to_dict()}")
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
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowBitLinear)]


def _layers_to_quantize(model: Any, skip: Iterable[str], widest: int | None) -> dict[str, nn.Linear]:
    """The same choice as `octavo.quantize_model`'s, on a model whose weights are not tied yet."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    left_alone = {key.removesuffix(".weight") for key in (*tied.keys(), *tied.values())}
    left_alone |= {*(model._keep_in_fp32_modules or ())}
    patterns = tuple(skip)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name not in left_alone
        and name.rpartition(".")[2] not in left_alone
        and not any(matches((name,), pattern) for pattern in patterns)
        and (widest is None or module.in_features <= widest)
    }


# ---- what a saved checkpoint holds, before any of it is loaded ------------------------------------------------------


def _headers_of(config: OctavoConfig, files: Sequence[str]) -> _Headers:
    # A configuration has headers where the tensors are in memory: see _bitsandbytes_models.
    headers: _Headers | None = getattr(config, "headers", None)
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


def _stored_name(
    name: str, prefix: str, leaves: Sequence[str], headers: _Headers, may_lack: bool = False
) -> str | None:
    """A layer's name in the checkpoint: a base model's may be read into a model with a head, or the other way round."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if any(f"{candidate}.{leaf}" in headers for leaf in leaves):
            return candidate
    if may_lack:
        return None
    raise ValueError(f"the checkpoint has no {' or '.join(f'{name}.{leaf}' for leaf in leaves)}")


def _new_layer(linear: nn.Linear, stored: str | None, config: OctavoConfig, headers: _Headers) -> nn.Module | None:
    """The module that takes the place of `linear`, on the meta device, with room for what the checkpoint has; None: it
    stays."""
    method = methods()[config.method]
    if stored is None and not method.in_stream:
        raise ValueError(f"a checkpoint of {method.name} is loaded from safetensors files; there are none")
    name = method.name if stored is None else _stored_method(stored, method, config, headers)
    if name is None:
        return None
    cls, dtype = layer_class(name), linear.weight.dtype
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    described = sizes | config.layout(name)
    if stored is None:
        return _computing_in(dtype, cls.from_configuration(described, dtype))
    state = _stored_state(stored, (*cls.tensors, "bias"), headers)
    described |= cls.read_from(state)
    if missing := sorted(cls.tensor_names(described) - state.keys()):
        raise ValueError(f"{stored}: the checkpoint has no {stored}.{missing[0]}")
    new = cls.from_configuration(described, dtype)
    if errors := cls.tensor_errors(state, described):
        raise ValueError(f"{stored}: {errors[0]}")
    new.fit_to(state)
    return _computing_in(dtype, new)


def _computing_in(dtype: torch.dtype, layer: LowBitLinear) -> LowBitLinear:
    layer.compute_dtype = dtype
    return layer


def _stored_method(stored: str, method: Method, config: OctavoConfig, headers: _Headers) -> str | None:
    """How the checkpoint has this layer: None for unquantized. Where octavo wrote one of a method that allows no others
    beside it, all layers are of the method."""
    if not method.beside and not hasattr(config, "headers"):
        return method.name
    return _recognized(stored, method, headers)


def _recognized(stored: str, method: Method, headers: _Headers) -> str | None:
    """The method whose layer the checkpoint's tensors are: the checkpoint's own, or one beside it; None for neither."""
    names = (method.name, *method.beside)
    leaves = {leaf for name in names for leaf in layer_class(name).tensors}
    dtypes = {leaf: tensor.dtype for leaf, tensor in _stored_state(stored, leaves, headers).items()}
    return next((name for name in names if layer_class(name).recognizes(dtypes)), None)


def _stored_state(stored: str, names: Iterable[str], headers: _Headers) -> dict[str, Tensor]:
    """The tensors of a layer as the checkpoint has them, without their values."""
    state = {}
    for name in names:
        dtype, shape = headers.get(f"{stored}.{name}", ("", []))
        if dtype:
            state[name] = torch.empty(shape, dtype=SAFETENSORS_DTYPES.get(dtype, torch.float64), device="meta")
    return state


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
