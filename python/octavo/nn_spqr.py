"""`SpQRLinear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._frozen import FLOATS, FrozenBuffers, dtype_name
from .autograd import spqr_matmul_flat
from .spqr import SpQRWeight
from .spqr.packing import WIDE
from .spqr.weight import TENSORS

_REQUIRED = tuple(name for name in TENSORS if name not in ("second_order", "perm"))


class SpQROptions(NamedTuple):
    """The numbers that say how the tensors of an SpQR weight are to be read; see `SpQRWeight`."""

    bits: int = 3
    group_size: int = 16
    stats_group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3

    def check(self) -> None:
        """ValueError unless the operators know these numbers."""
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4, got {self.bits}")
        if self.group_size not in (16, 32, 64):
            raise ValueError(f"group_size must be 16, 32 or 64, got {self.group_size}")
        if not 16 <= self.stats_group_size <= 1024 or self.stats_group_size % 16:
            raise ValueError(f"stats_group_size must be a multiple of 16 up to 1024, got {self.stats_group_size}")
        for name in ("scale_bits", "zero_bits"):
            if not 1 <= getattr(self, name) <= 4:
                raise ValueError(f"{name} must be 1 to 4, got {getattr(self, name)}")


def check_spqr_state(
    state: Mapping[str, Tensor], in_features: int, out_features: int, options: SpQROptions
) -> list[str]:
    """What is wrong with the tensors of an `SpQRLinear`, one line each: missing, dtype, shape, values.

    Nothing is wrong with a state without any tensor of the weight. Values are read only where dtypes and shapes are
    right, by `SpQRWeight.validate`.
    """
    n, k = out_features, in_features
    tiles, groups = -(-n // 16), k // options.group_size
    wide = k > WIDE
    outliers = state["outliers"].shape[0] if "outliers" in state and state["outliers"].dim() else 0
    bilevel = (torch.uint8, (tiles, groups, 2 * (options.scale_bits + options.zero_bits)))
    plain = (torch.float16, (tiles, groups, 2, 16))
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.int32, (tiles, -(-k // 32), options.bits, 16)),
        "statistics": bilevel if "second_order" in state else plain,
        "second_order": (torch.float16, (-(-n // options.stats_group_size), groups, 4)),
        "unit": (torch.float32, (1,)),
        "outliers": (torch.int32, (outliers, 2 if wide else 1)),
        "row_offsets": (torch.int32, (n + 1,)),
        "perm": (torch.int32, (k if wide else -(-k // 2),)),
    }
    errors = []
    for name, (dtype, shape) in wanted.items():
        tensor = state.get(name)
        if tensor is not None and (tensor.dtype is not dtype or tuple(tensor.shape) != shape):
            kind = str(dtype).removeprefix("torch.")
            errors.append(f"{name} must be {kind} {list(shape)}, got {dtype_name(tensor)} {list(tensor.shape)}")
    bias = state.get("bias")
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (n,)):
        errors.append(f"bias must be float32, float16 or bfloat16 [{n}], got {dtype_name(bias)} {list(bias.shape)}")
    present = [name for name in TENSORS if name in state]
    if present and (missing := [name for name in _REQUIRED if name not in state]):
        errors.append(f"{', '.join(missing)} missing beside {', '.join(present)}: they are one weight")
    if not errors and present and not any(state[name].is_meta for name in present):
        tensors: dict[str, Any] = {name: state.get(name) for name in TENSORS}
        errors += SpQRWeight(n, k, *options, **tensors).validate()
    return errors


class SpQRLinear(FrozenBuffers):
    """`torch.nn.Linear` with an SpQR weight (arXiv 2306.03078): see `octavo.spqr_matmul` and `octavo.spqr.SpQRWeight`.

    ``y = x @ W.T + bias``, W in 2 to 4 bits with quantized statistics, and outliers beside it. x is [..., in_features]
    in fp32, fp16 or bf16 and y is [..., out_features] in the same dtype. Differentiable in x and bias; the weight is
    frozen.

    A new module is all zeros: fill it by `from_weight` or `load_state_dict`, which takes the number of outliers, and
    whether there are second-order statistics and a permutation, from the state that it loads; the sizes and options
    must be the module's. `.to(dtype)`, `.half()` and the like change only the bias: the quantized state keeps its
    dtypes.

    Attributes:
        in_features, out_features: k and n. k is a multiple of group_size.
        bits, group_size, stats_group_size, scale_bits, zero_bits: as in `octavo.spqr.SpQRWeight`.
        codes, statistics, second_order, unit, outliers, row_offsets, perm: buffers, as in `octavo.spqr_linear`;
            second_order and perm may be None.
        bias: [out_features], parameter, or None.

    Raises:
        ValueError: options that the operators do not know, in_features that group_size does not divide.
    """

    codes: Tensor
    statistics: Tensor
    second_order: Tensor | None
    unit: Tensor
    outliers: Tensor
    row_offsets: Tensor
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 3,
        group_size: int = 16,
        stats_group_size: int = 16,
        scale_bits: int = 3,
        zero_bits: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the bias's; the default dtype where it is None."""
        super().__init__()
        options = SpQROptions(bits, group_size, stats_group_size, scale_bits, zero_bits)
        options.check()
        if in_features % group_size:
            raise ValueError(f"in_features must be a multiple of group_size {group_size}, got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.stats_group_size = bits, group_size, stats_group_size
        self.scale_bits, self.zero_bits = scale_bits, zero_bits

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tiles, groups = -(-out_features // 16), in_features // group_size
        second_shape = (-(-out_features // stats_group_size), groups, 4)
        self.register_buffer("codes", zeros(tiles, -(-in_features // 32), bits, 16))
        self.register_buffer("statistics", zeros(tiles, groups, 2 * (scale_bits + zero_bits), dtype=torch.uint8))
        self.register_buffer("second_order", zeros(*second_shape, dtype=torch.float16))
        self.register_buffer("unit", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("outliers", zeros(0, 2 if in_features > WIDE else 1))
        self.register_buffer("row_offsets", zeros(out_features + 1))
        self.register_buffer("perm", None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def options(self) -> SpQROptions:
        """bits, group_size, stats_group_size, scale_bits and zero_bits."""
        return SpQROptions(self.bits, self.group_size, self.stats_group_size, self.scale_bits, self.zero_bits)

    @classmethod
    def from_weight(cls, weight: SpQRWeight, bias: Tensor | None = None) -> SpQRLinear:
        """A module with this weight: its tensors are shared, the bias is copied.

        Args:
            weight: on any device.
            bias: [weight.n], fp32, fp16 or bf16, on the weight's device; it goes on to require a gradient if it did.

        Raises:
            ValueError: tensors that do not fit together, values that kernels cannot trust (all of them are named).
        """
        options = SpQROptions(
            weight.bits, weight.group_size, weight.stats_group_size, weight.scale_bits, weight.zero_bits
        )
        out = cls(weight.k, weight.n, False, *options, device="meta")
        state = {name: getattr(weight, name) for name in TENSORS if getattr(weight, name) is not None}
        if bias is not None:
            state["bias"] = bias
        if errors := check_spqr_state(state, weight.k, weight.n, options):
            raise ValueError(f"SpQRLinear.from_weight: {'; '.join(errors)}")
        for name in TENSORS:
            out._buffers[name] = getattr(weight, name)
        if bias is not None:
            out.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return out

    @property
    def packed_weight(self) -> SpQRWeight:
        """The weight: the module's own tensors, not copies."""
        tensors: dict[str, Any] = {name: self._buffers[name] for name in TENSORS}
        return SpQRWeight(self.out_features, self.in_features, *self.options, **tensors)

    @property
    def qweight(self) -> Tensor:
        """codes, by the name under which PEFT looks for the device of a quantized layer."""
        return self.codes

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula: see `SpQRWeight.nominal_bits`."""
        return self.packed_weight.nominal_bits

    @property
    def real_bits(self) -> float:
        """Bits stored per weight, everything counted but the bias: see `SpQRWeight.real_bits`."""
        return self.packed_weight.real_bits

    @property
    def outlier_count(self) -> int:
        """How many weights are stored apart."""
        return self.outliers.shape[0]

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the weight that this module multiplies by, rounded once to `dtype`.

        Args:
            dtype: of weight and bias; None for the bias's dtype, or the default dtype where there is no bias.
        """
        dtype = dtype or (torch.get_default_dtype() if self.bias is None else self.bias.dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed_weight.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        tensors = (
            self.codes, self.statistics, self.second_order, self.unit, self.outliers, self.row_offsets, self.perm,
        )  # fmt: skip
        sizes = (self.out_features, self.group_size, self.stats_group_size, self.scale_bits, self.zero_bits)
        return spqr_matmul_flat(x, tensors, self.bias, sizes)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", bits={self.bits}, group_size={self.group_size}"
        if self.second_order is not None:
            text += f", stats_group_size={self.stats_group_size}"
            text += f", scale_bits={self.scale_bits}, zero_bits={self.zero_bits}"
        return f"{text}, outliers={self.outlier_count}"

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
        if errors := check_spqr_state(state, self.in_features, self.out_features, self.options):
            where = f"{type(self).__name__} {prefix[:-1]!r}" if prefix else type(self).__name__
            error_msgs.extend(f"{where}: {error}" for error in errors)
            return
        if "codes" in state:  # a new weight brings its outliers, and what else it has or has not
            device = self.codes.device
            for name in TENSORS:
                current, new = self._buffers[name], state.get(name)
                if new is None:
                    self._buffers[name] = None
                elif current is None or current.shape != new.shape or current.dtype is not new.dtype:
                    self._buffers[name] = torch.empty_like(new, device=device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
