"""`LowBitLinear` is the base class of all linear layers with a quantized weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .checks import WIDE_FLOATS
from .transposed import store_transposed
from .weight_view import WeightView, read_only

_Self = TypeVar("_Self", bound="FrozenBuffers")
_Layer = TypeVar("_Layer", bound="LowBitLinear")


class FrozenBuffers(nn.Module):
    """A module whose buffers keep their dtypes: `.to(dtype)`, `.type(dtype)`, `.half()` and the like change only its
    parameters, and of these only floats."""

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # Moves follow fn; dtype changes stop at the parameters. A scale that went through fp16 would be another weight.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        parameters = {name: p.data for name, p in self._parameters.items() if p is not None}
        codes = {name: value for name, value in parameters.items() if not value.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        for name, value in codes.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype is not value.dtype:
                parameter.data = value.to(parameter.device)
        return self


class LowBitLinear(FrozenBuffers, nn.Linear, ABC):
    """A linear layer whose weight is stored in few bits: what all such layers do alike.

    It is a `torch.nn.Linear` to who asks, as libraries that adapt or shard such layers do, and keeps what that
    promises: `in_features`, `out_features`, `bias`, and a `weight` [n, k] to read. That is a `WeightView`: a float
    tensor that is dequantized where it is used. What is stored is `codes`, and other tensors beside it; in state dicts
    the codes have the name `key`.

    A subclass names its tensors and the fields of its configuration, and writes `forward`, `_dequantized`,
    `nominal_bits`, `from_configuration` and `tensor_errors`; without one of them it cannot be made. The
    configuration is what `octavo.json` has of a layer, and is enough, with the tensors, to make it anew.

    Attributes:
        in_features, out_features: k and n.
        bias: [out_features], parameter, or None.
        compute_dtype: of `weight`, and of `dequantize` by default: that of the weight that was quantized, until
            ``.to(dtype)`` changes it as it would change a `torch.nn.Linear`.
        stored_as: the name that files have for the class, given by the registry.
        tensors: names of the tensors of the weight; the bias is beside them.
        key: the tensor without which a state has no weight.
        optional: tensors that need not be there, each with the field of the configuration that says whether it is.
        flat_in_files: whether codes of the weight's own shape are flat in files of transformers, where who cannot read
            them would take them for the weight. `unflattened` then gives them their shape again.
        fields: of the configuration, beside ``in_features``, ``out_features`` and ``bias``, with their types.
    """

    stored_as: ClassVar[str] = ""
    tensors: ClassVar[tuple[str, ...]]
    key: ClassVar[str] = "weight"
    optional: ClassVar[Mapping[str, str]] = {}
    flat_in_files: ClassVar[bool] = False
    fields: ClassVar[Mapping[str, Any]]
    in_features: int
    out_features: int
    bias: nn.Parameter | None  # type: ignore[assignment]
    compute_dtype: torch.dtype
    _stored = False
    _octavo_transposed = False  # whether it was a Conv1D of transformers: see linears.py

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # torch.nn.Linear's would make a weight
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype or torch.get_default_dtype()

    def reset_parameters(self) -> None:
        """There is nothing to initialize: the weight comes from `from_linear` or a state dict."""
        raise RuntimeError(f"{type(self).__name__} has no initial values: quantize a layer that has, or load a state")

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if dtype.is_floating_point:
            self.compute_dtype = dtype
        return self

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of every module; codes may have the name ``weight``."""
        if name not in (self.key, "weight"):
            return super().register_buffer(name, tensor, persistent)
        self._check_codes(name, tensor)
        self._buffers[name] = tensor

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; codes may have the name ``weight``."""
        if name.startswith("weight_"):  # of torch's pruning and norms, which take the weight away at once
            raise read_only(self)
        if name not in (self.key, "weight"):
            return super().register_parameter(name, param)
        self._check_codes(name, param)
        self._parameters[name] = param

    def _check_codes(self, name: str, value: Any) -> None:
        """A float weight in the place of codes would be multiplied by as if it were codes."""
        if self.key != name or value is None or value.dtype in WIDE_FLOATS:
            raise read_only(self)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise read_only(self)
        super().__delattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._check_codes(name, value)
        if name == self.key and isinstance(value, Tensor):
            value = self.unflattened({name: value}, self._sizes())[name]
        super().__setattr__(name, value)

    def _zero_bias(self, wanted: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        zeros = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if wanted else None
        self.bias = zeros

    def _copy_bias(self, bias: Tensor | None) -> None:
        """Take a copy of a bias; it goes on to require a gradient if it did."""
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)

    def _frozen_bias_for(self, layer: LowBitLinear) -> None:
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)

    def _put(self, name: str, tensor: Tensor | None) -> None:
        """Make it the module's tensor of this name."""
        self._buffers[name] = tensor

    def _tensor(self, name: str) -> Tensor | None:
        """The stored tensor of this name."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """For who moves tensors by their names: within this, ``weight`` is the tensor of that name."""
        self._stored = self.key == "weight"
        try:
            yield
        finally:
            self._stored = False

    # ---- the weight --------------------------------------------------------------------------------------------------

    @property
    def codes(self) -> Tensor:
        """What is stored of the weight under `key`: the quantized codes."""
        return self._parameters[self.key] if self.key in self._parameters else self._buffers[self.key]  # type: ignore[return-value]

    @property
    def qweight(self) -> Tensor:
        """`codes`, by the name under which PEFT looks for a quantized weight's device."""
        return self.codes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the layer multiplies by, [n, k] in `compute_dtype`: see `octavo.core.weight_view`."""
        codes = self.codes
        if self._stored or hasattr(codes, "full_tensor"):  # FSDP2 looks here for the shard that it has put here
            return codes
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self._dequantized(self.compute_dtype)  # removed from the graph where only its dtype is asked
        if not codes.is_meta:
            return WeightView(self)
        # An offloaded tensor is told from others by its identity; where there are no values, a circle holds no memory.
        kept = self.__dict__.get("_meta_view")
        if not isinstance(kept, WeightView) or kept._layer is not self or kept.dtype is not self.compute_dtype:
            kept = self.__dict__["_meta_view"] = WeightView(self)
        return kept

    @abstractmethod
    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [n, k], rounded once to `dtype`."""

    def float_dtype(self) -> torch.dtype:
        """The dtype of the unquantized layer."""
        return self.compute_dtype

    def default_dtype(self) -> torch.dtype:
        """`compute_dtype` of a layer that files say nothing of: the bias's dtype, or fp32."""
        return torch.float32 if self.bias is None else self.bias.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the weight that this module multiplies by, rounded once to `dtype`.

        Args:
            dtype: of weight and bias; None for `float_dtype`, the bias as it is.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._dequantized(dtype or self.float_dtype()))
        if self.bias is not None:
            bias = self.bias.detach().to(dtype or self.bias.dtype, copy=True)
            linear.bias = nn.Parameter(bias, self.bias.requires_grad)
        if self._octavo_transposed:
            store_transposed(linear)
        return linear.train(self.training)

    def quantize_like(self, linear: nn.Linear) -> LowBitLinear:
        """`linear` quantized with the settings of this layer; its bias is this layer's.

        Raises:
            ValueError: the method needs calibration data for that.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be quantized again without calibration data: merge with requantize=False, "
            "and quantize the merged model"
        )

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula."""

    @property
    def real_bits(self) -> float:
        """Bits per weight as stored, everything counted but the bias."""
        tensors = [tensor for name in self.tensors if (tensor := self._tensor(name)) is not None]
        stored: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return 8 * stored / max(1, self.in_features * self.out_features)

    def figures(self) -> dict[str, Any]:
        """The figures that a report shows for the layer beside its size."""
        return {"nominal_bits": self.nominal_bits, "real_bits": self.real_bits}

    # ---- what files say of it ----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """How the layer is quantized, in the words that an adapter's file has for its base."""
        return self.stored_as

    def configuration(self) -> dict[str, Any]:
        """The configuration from which `from_configuration` makes a module like this one."""
        return self._sizes() | {name: getattr(self, name) for name in self.fields}

    def _sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    @classmethod
    @abstractmethod
    def from_configuration(cls, config: Mapping[str, Any], dtype: torch.dtype | None) -> LowBitLinear:
        """A module on the meta device, its weight all zeros; dtype is its bias's.

        Raises:
            ValueError: numbers that cannot be.
        """

    @classmethod
    def check_configuration(cls, config: Mapping[str, Any]) -> None:
        """ValueError unless there can be such a layer."""
        if min(config["in_features"], config["out_features"]) < 0:
            raise ValueError(f"in_features and out_features are {config['in_features']} and {config['out_features']}")
        cls.from_configuration(config, None)

    @classmethod
    def tensor_names(cls, config: Mapping[str, Any]) -> set[str]:
        """The tensors that a module so configured has, the bias included."""
        asked = {**cls.optional, "bias": "bias"}
        return {name for name in (*cls.tensors, "bias") if name not in asked or config[asked[name]]}

    @classmethod
    @abstractmethod
    def tensor_errors(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
        """List the errors of a module's tensors, one line each: missing, dtype, shape, values.

        Nothing is wrong with a state without any tensor of the weight.
        """

    @classmethod
    def read_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of the configuration that tensors say by being there, or by their shape."""
        return {}

    @classmethod
    def errors(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
        """`tensor_errors`, and where the tensors are not those of the configuration."""
        errors = cls.tensor_errors(state, config)
        if not errors:
            for name, value in cls.read_from(state).items():
                if value != config[name]:
                    errors.append(f"has {value} {name.replace('_', ' ')}, not {config[name]}")
        return errors

    @classmethod
    def recognizes(cls, stored: Mapping[str, torch.dtype]) -> bool:
        """Whether tensors with these names and dtypes are those of such a layer."""
        return cls.key in stored

    @classmethod
    def unflattened(cls, state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """A state whose codes may have been flattened, as files of transformers have them, as the module has it."""
        return state

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return "".join((text, *(f", {name}={value}" for name, value in self._described().items())))

    def _described(self) -> Mapping[str, Any]:
        """The fields that `extra_repr` shows beside sizes and bias."""
        return {}

    def fit_to(self, state: Mapping[str, Tensor]) -> None:
        """Make room for the tensors of a state; a new weight also brings which optional tensors it has."""
        device = self.codes.device
        for name in self.tensors:
            current, new = self._tensor(name), state.get(name)
            if new is None:
                if name in self.optional and self.key in state:
                    self._put(name, None)
            elif current is None or current.shape != new.shape or current.dtype is not new.dtype:
                self._put(name, torch.empty_like(new, device=device))

    def _translate(self, state: dict[str, Tensor]) -> tuple[list[str], dict[str, Any]]:
        """Turn the state of another library into this class's, in place.

        Returns:
            What is wrong with it, and attributes to set if all is right in the end.
        """
        return [], {}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        state = self.unflattened(state, self._sizes())
        errors, attributes = self._translate(state)
        whole = state
        if self.key not in state:  # a part, or nothing: who loads it is told which keys are missing
            own = {name: self._tensor(name) for name in self.tensors}
            whole = {name: tensor for name, tensor in own.items() if tensor is not None} | state
        errors = errors or self.tensor_errors(whole, self.configuration())
        if errors:
            where = f"{type(self).__name__} {prefix[:-1]!r}" if prefix else type(self).__name__
            error_msgs.extend(f"{where}: {error}" for error in errors)
            return
        for name, value in attributes.items():
            setattr(self, name, value)
        self.fit_to(state)
        state = {prefix + name: value for name, value in state.items()}
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
