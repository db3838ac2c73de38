"""octavo in transformers: ``AutoModelForCausalLM.from_pretrained(path, quantization_config=OctavoConfig())``.

transformers knows the method "octavo" as soon as torch is imported (see ``octavo_autoload``), so that a directory saved
with it loads like any other checkpoint. Weights are quantized, to int8 or 4 bits, one tensor at a time while the
checkpoint is read: at most one of them is in memory unquantized. Layers that the checkpoint does not have, as the head
of another task, stay `torch.nn.Linear` and are initialized as usual. SpQR needs calibration data, which loading has
not: `octavo.quantize_model` makes such a model. What octavo changes in a transformers model is recorded in its
configuration (`mark_all`), so that its own ``save_pretrained`` writes it and ``from_pretrained`` reads it: layers of
any method, LoRA adapters, also on an unquantized base.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.linears import is_stored_transposed
from ..core.low_bit import LowBitLinear
from ..core.method import Method, find_method, is_unquantized, methods
from ..core.targets import SKIP, as_patterns, find_targets, linears_of
from ..lora.layers import unwrapped
from ..lora.linear import LoRAConfig, LoRALinear
from ..switchback.linear import Int8Weight
from ._checkpoint import Stored, keep_whole, read_headers
from ._construction import check_adapters, like, offload_codes, sizes_of, stored_layer, wrap

FORMAT_VERSION = 1


class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize a model while transformers loads it; saved in its ``config.json``.

    Args:
        method: "int8": LLM.int8() (arXiv 2208.07339). "nf4" or "fp4": 4 bits, as QLoRA (arXiv 2305.14314) has them.
            "spqr": SpQR (arXiv 2306.03078), for checkpoints that hold such layers already. In a checkpoint of nf4 or
            spqr a layer whose weight is stored in int8 or unquantized is loaded as that. "none": adapters alone.
        skip: patterns (as of `fnmatch`, or plain names) of layers to leave alone: full names, last components of names,
            or modules that contain the layers.
        format_version: of the saved tensors; written and checked by octavo.
        layers: settings of layers that differ from the others, by name; written by octavo.
        adapters: LoRA adapters by the name of their layer; written by octavo.
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
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        settings.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(f"octavo format_version {format_version!r}: this octavo reads {FORMAT_VERSION}")
        self.quant_method = "octavo"
        self.skip = list(as_patterns("skip", skip))
        self.format_version = format_version
        for what, value in (("layers", layers), ("adapters", adapters)):
            if not isinstance(value, Mapping | None):
                raise ValueError(f"{what} must be a mapping of names of layers, got {value!r}")
        self.layers = {name: _checked_layer(name, given) for name, given in (layers or {}).items()}
        self.adapters = {name: _checked_adapters(name, given) for name, given in (adapters or {}).items()}
        if is_unquantized(method):
            self.method = method
            return
        found, given = find_method(method, settings)
        given = {name: value for name, value in given.items() if value is not None}
        own = methods()[found.stored]
        known = own.layout_defaults()
        beside = {name: value for other in own.beside for name, value in methods()[other].layout_defaults().items()}
        found.check_names((name for name in given if name not in beside), known=tuple(known))
        self.method = own.name
        for name in (own.name, *own.beside):
            defaults = methods()[name].layout_defaults()
            layout = {key: given.get(key, value) for key, value in defaults.items()}
            self.__dict__.update(methods()[name].check_layout(layout))

    def to_dict(self) -> dict[str, Any]:
        """As it is written to ``config.json``: without what is empty."""
        found: dict[str, Any] = super().to_dict()
        return {name: value for name, value in found.items() if name not in ("layers", "adapters") or value}

    def layout(self, stored: str | None = None) -> dict[str, Any]:
        """The settings that the configuration records for all layers of a method; None means its own method."""
        defaults = methods()[stored or self.method].layout_defaults()
        return {name: getattr(self, name, default) for name, default in defaults.items()}


def _checked_layer(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or str(given.get("method")) not in methods():
        raise ValueError(f"quantization_config has layers[{name!r}] = {given!r}, without a method that octavo knows")
    method = methods()[given["method"]]
    layout = {key: value for key, value in given.items() if key != "method"}
    method.check_names(layout, known=tuple(method.layout_defaults()))
    return {"method": method.name, **method.check_layout({**method.layout_defaults(), **layout})}


def _checked_adapters(name: str, given: Any) -> dict[str, Any]:
    try:
        for adapter, settings in given["adapters"].items():
            LoRAConfig(**settings).check()
            if settings["rank"] > 1 << 20:
                raise ValueError(f"rank of {adapter} is {settings['rank']}")
        if given["active"] is not None and str(given["active"]) not in given["adapters"]:
            raise ValueError(f"active is {given['active']!r}")
        return {"adapters": dict(given["adapters"]), "active": given["active"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"quantization_config has adapters[{name!r}] = {given!r}: {error!r}") from None


class _Quantize(ConversionOps):  # type: ignore[misc]
    """One Linear weight, as read from a checkpoint, to the tensors of a quantized layer."""

    def __init__(self, method: Method, settings: Any) -> None:
        self.method, self.settings = method, settings

    def convert(self, input_dict: Mapping[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            owner = name.rpartition(".")[0]
            if model is not None and is_stored_transposed(model.get_submodule(owner)):
                weight = weight.t().contiguous()
            made = self.method.quantize_stored(weight, self.settings)
            out |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in made.items()}
        return out


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
    has_adapters = False
    refusal = ""  # why the model cannot be saved

    @property
    def _method(self) -> Method:
        return methods()[self.quantization_config.method]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            return
        if is_unquantized(self.quantization_config.method):
            raise ValueError(f"method {self.quantization_config.method!r} quantizes nothing: leave quantization_config")
        if not self._method.in_stream:
            name = self._method.name
            raise ValueError(
                f"{name} needs calibration data and cannot quantize a model while it is loaded: load it without "
                f"quantization_config and call octavo.quantize_model(model, method={name!r}, calibration=...)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        _count_parameters_of(type(model))
        # A configuration has headers where the tensors are in memory: see _bitsandbytes_models.
        headers = getattr(config, "headers", None)
        stored = Stored(model, read_headers(checkpoint_files or ()) if headers is None else headers)
        if self.pre_quantized:
            self.has_adapters = bool(config.adapters)
            wrap(model, config.adapters)
            stored = Stored(model, stored.headers)
            if stored.headers:
                check_adapters(stored, config, model)
            for name, linear in ((names[0], module) for module, names in linears_of(model)[0].items()):
                if (new := stored_layer(name, linear, stored, config)) is not None:
                    model.set_submodule(name, new.train(linear.training))
            if not (_quantized_layers(model) or config.adapters):
                raise ValueError(f"the checkpoint of {type(model).__name__} has no quantized layer of {config.method}")
            if stored.markers:
                ignored = model._keys_to_ignore_on_load_unexpected or ()
                model._keys_to_ignore_on_load_unexpected = {*ignored, *stored.markers}
            return
        targets, _ = find_targets(model, config.skip, self._method.widest)
        for target in targets:
            weight: Any = target.module.weight
            shape = tuple(weight.shape)
            if all(stored.has_weight(name, shape) for name in target.names[:1]):
                linear = target.linear
                sizes = sizes_of(linear)
                new = self._method.layer.from_configuration(sizes | config.layout(), linear.weight.dtype)
                for name in target.names:
                    model.set_submodule(name, like(linear, new).train(linear.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Of a checkpoint of octavo's it is not asked whether to quantize, but whether shapes may differ.
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(owner), LowBitLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._method, self._method.Settings(**self.quantization_config.layout()))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in _quantized_layers(model):
            if not self.pre_quantized and layer.qweight.is_meta:
                offload_codes(model, layer, name, self.get_quantize_ops())
            errors = layer.errors(layer.state_dict(), layer.configuration())
            if errors:
                where = "" if self.pre_quantized else ": the checkpoint's weight holds NaN or Inf"
                raise ValueError(f"{name}: {errors[0]}{where}")
        for name, layer in model.named_modules():
            base = getattr(layer, "base_layer", None)
            if isinstance(layer, LoRALinear) and type(base) is nn.Linear and is_stored_transposed(base):
                if base.weight.is_meta:
                    raise ValueError(f"{name} is a Conv1D with adapters, which cannot be offloaded to disk")
                base.weight = nn.Parameter(base.weight.detach().t(), requires_grad=False)
        if self.has_adapters:
            trained = {id(p) for m in model.modules() if isinstance(m, LoRALinear) for p in m.adapter_parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in trained)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes. Codes have a shape that is not the float weight's: who cannot read them is
        told of it, instead of taking them for weights."""
        if self.refusal:
            raise ValueError(self.refusal)
        model = unwrapped(model)
        _refresh(model, self)
        keep_whole(model, [name for name, _ in _quantized_layers(model)])
        state = dict(model.state_dict())
        seen: set[tuple[torch.device, int]] = set()
        for name, layer in _quantized_layers(model):
            for leaf in layer.tensors:
                key = f"{name}.{leaf}"
                if (tensor := state.get(key)) is None or not tensor.numel() or tensor.is_meta:
                    continue
                if leaf == "weight" and layer.flat_in_files:
                    state[key] = tensor = tensor.flatten()
                place = (tensor.device, tensor.data_ptr())
                if place in seen and hasattr(tensor, "untyped_storage"):  # layers share a permutation, files do not
                    state[key] = tensor.clone()
                seen.add(place)
            if layer.key != "weight":
                state[f"{name}.weight"] = torch.zeros(1, dtype=torch.bool)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a configuration that was saved once holds these
            dtype = getattr(torch, dtype.removeprefix("torch."))
        if adapted := next((name for name, m in model.named_modules() if isinstance(m, LoRALinear)), None):
            raise ValueError(
                f"{adapted} has LoRA adapters: octavo.merge_adapter(model, keep=False) puts one into float weights, "
                "octavo.remove_lora takes them away"
            )
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
    def is_qat_trainable(self) -> bool:
        """Whether it is ready to train: whether there are adapters of octavo's."""
        return self.has_adapters

    @property
    def is_compileable(self) -> bool:
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING["octavo"] = OctavoConfig
AUTO_QUANTIZER_MAPPING["octavo"] = OctavoQuantizer


# ---- what is written into the configuration --------------------------------------------------------------------------


def mark_quantized(model: Any, config: OctavoConfig) -> None:
    """Give a transformers model that octavo changed a configuration of your own making, instead of that of `mark_all`.

    Args:
        model: a ``PreTrainedModel`` holding quantized layers.
        config: with the settings that its layers have: for `NF4Linear` ``OctavoConfig("nf4", quant_type=...,
            blocksize=...)``, for `SpQRLinear` ``OctavoConfig("spqr", **layer.options._asdict())``. With these two,
            there may be `Int8Linear` and unquantized layers beside.

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
    _mark(model, config)


def mark_all(model: nn.Module) -> None:
    """Record in each transformers model in `model`, itself included, what octavo made of its layers.

    Example:
        >>> import octavo, transformers
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
        >>> report = octavo.quantize_model(model, "nf4", progress=False)  # which calls mark_all
        >>> model.config.quantization_config.method
        'nf4'
    """
    from transformers import PreTrainedModel

    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inner:
            inner |= {id(m) for m in module.modules()}
            _mark_one(module)


def _mark_one(model: Any) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, OctavoQuantizer):
        return  # another library's
    layers = _quantized_layers(model)
    adapted, adapters = _adapters_of(model)
    prepared = [name for name, m in model.named_modules() if isinstance(m, Int8Weight) and m.prepared]
    if not (layers or adapted or prepared):
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
        return
    _mark(model, describe_layers(model, None if quantizer is None else quantizer.quantization_config, adapters))
    model.hf_quantizer.has_adapters = adapted
    if prepared:
        model.hf_quantizer.refusal = (
            f"{prepared[0]} was prepared for evaluation by prepare_for_eval, which save_pretrained cannot write so "
            "that it is read again: save the model before, or its state_dict"
        )


def _refresh(model: Any, quantizer: OctavoQuantizer) -> None:
    """Bring the configuration to what the layers are by now: some may have been replaced or changed one by one."""
    config = quantizer.quantization_config
    quantizer.has_adapters, adapters = _adapters_of(model)
    layers = _quantized_layers(model)
    if not layers and not adapters:
        quantizer.remove_quantization_config(model)
        return
    if not all(_says(config, name, layer) for name, layer in layers) or not (layers or is_unquantized(config.method)):
        config = describe_layers(model, config)
    config.adapters = adapters
    quantizer.quantization_config = model.config.quantization_config = config


def _says(config: OctavoConfig, name: str, layer: Any) -> bool:
    """Whether a configuration makes this layer."""
    known = methods()[layer.stored_as].layout_defaults()
    own = {key: value for key, value in layer.configuration().items() if key in known}
    if (override := config.layers.get(name)) is not None:
        return bool(override == {"method": layer.stored_as, **own})
    if is_unquantized(config.method) or layer.stored_as not in (config.method, *methods()[config.method].beside):
        return False
    return own == config.layout(layer.stored_as)


def describe_layers(model: nn.Module, before: OctavoConfig | None, adapters: Any = None) -> OctavoConfig:
    """The configuration of the quantized layers that a model has: what most of them have in common, and the others.

    Example:
        >>> import octavo, torch
        >>> from octavo.integrations.transformers import describe_layers
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64), blocksize=128))
        >>> describe_layers(model, None).blocksize
        128
    """
    layouts = {}
    for name, layer in _quantized_layers(model):
        known = methods()[layer.stored_as].layout_defaults()
        kept = {key: value for key, value in layer.configuration().items() if key in known}
        layouts[name] = (layer.stored_as, tuple(kept.items()))
    common = Counter(layouts.values()).most_common(1)
    method, settings = common[0][0] if common else ("none", ())
    others = {name: {"method": m, **dict(s)} for name, (m, s) in layouts.items() if (m, s) != (method, settings)}
    skip = SKIP if before is None else before.skip
    return OctavoConfig(method, skip=skip, layers=others, adapters=adapters, **dict(settings))


def _adapters_of(model: nn.Module) -> tuple[bool, dict[str, Any]]:
    """Whether a model has adapters of octavo's, and what a configuration says of them."""
    found = {
        name: {"adapters": {n: c._asdict() for n, c in layer.adapters.items()}, "active": layer.active_adapter}
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
    }
    return bool(found), found


def _mark(model: Any, config: OctavoConfig) -> None:
    _count_parameters_of(type(model))
    if getattr(model, "hf_quantizer", None) is None and model.base_model is not model:
        shared = model.config  # perhaps with another model, of which nothing is to be said
        own = copy.copy(shared)
        for module in model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own
    model.hf_quantizer = OctavoQuantizer(config, pre_quantized=True)
    model.is_quantized = not is_unquantized(config.method)
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def _count_parameters_of(cls: Any) -> None:
    """Let ``num_parameters`` of transformers' models count the weights of low-bit layers, not their bytes."""
    base = next(b for b in cls.__mro__ if "num_parameters" in vars(b))
    count = base.num_parameters
    if getattr(count, "_of_octavo", False):
        return

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found: int = count(self, only_trainable, exclude_embeddings)
        if not only_trainable:
            for _, layer in _quantized_layers(self):
                stored = (layer._parameters.get(name) for name in layer.tensors)
                found += layer.in_features * layer.out_features - sum(p.numel() for p in stored if p is not None)
        return found

    num_parameters.__doc__ = count.__doc__
    num_parameters._of_octavo = True  # type: ignore[attr-defined]
    base.num_parameters = num_parameters


def _quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowBitLinear)]
