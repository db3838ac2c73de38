"""`SpQRLinear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.checks import bias_errors, dtype_name, name_of_dtype
from ..core.low_bit import LowBitLinear
from .functional import spqr_matmul_flat
from .packing import WIDE
from .weight import TENSORS, SpQRWeight

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


def _tensor_errors(state: Mapping[str, Tensor], in_features: int, out_features: int, options: SpQROptions) -> list[str]:
    """List the errors of the tensors of an `SpQRLinear`, one line each: missing, dtype, shape, values.

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
            kind = name_of_dtype(dtype)
            errors.append(f"{name} must be {kind} {list(shape)}, got {dtype_name(tensor)} {list(tensor.shape)}")
    errors += bias_errors(state.get("bias"), n)
    present = [name for name in TENSORS if name in state]
    if present and (missing := [name for name in _REQUIRED if name not in state]):
        errors.append(f"{', '.join(missing)} missing beside {', '.join(present)}: they are one weight")
    if not errors and present and not any(state[name].is_meta for name in present):
        tensors: dict[str, Any] = {name: state.get(name) for name in TENSORS}
        errors += SpQRWeight(n, k, *options, **tensors).validate()
    return errors


def _options_of(config: Mapping[str, Any]) -> SpQROptions:
    return SpQROptions(*(config[name] for name in SpQROptions._fields))


class SpQRLinear(LowBitLinear):
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
        codes, statistics, second_order, unit, outliers, row_offsets, perm: buffers, as in `octavo.ops.spqr_linear`;
            second_order and perm may be None.
        bias: [out_features], parameter, or None.

    Raises:
        ValueError: options that the operators do not know, in_features that group_size does not divide.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = octavo.quantize_model(model, "spqr", calibration=[torch.randn(256, 64)], progress=False)
        >>> model[0](torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    tensors = TENSORS
    key = "codes"
    optional: ClassVar[dict[str, str]] = {"second_order": "bilevel", "perm": "perm"}
    fields: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(SpQROptions._fields, int),
        "bilevel": bool,
        "perm": bool,
        "outliers": int,
    }
    statistics: Tensor
    second_order: Tensor | None
    unit: Tensor
    outliers: Tensor
    row_offsets: Tensor
    perm: Tensor | None

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
        """`dtype` is the bias's, and `compute_dtype`; the default dtype where it is None."""
        super().__init__(in_features, out_features, dtype)
        options = SpQROptions(bits, group_size, stats_group_size, scale_bits, zero_bits)
        options.check()
        if in_features % group_size:
            raise ValueError(f"in_features must be a multiple of group_size {group_size}, got {in_features}")
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
        self._zero_bias(bias, device, dtype)

    @property
    def options(self) -> SpQROptions:
        """bits, group_size, stats_group_size, scale_bits and zero_bits."""
        return SpQROptions(self.bits, self.group_size, self.stats_group_size, self.scale_bits, self.zero_bits)

    @classmethod
    def from_weight(
        cls, weight: SpQRWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> SpQRLinear:
        """A module with this weight: its tensors are shared, the bias is copied.

        Args:
            weight: on any device.
            bias: [weight.n], fp32, fp16 or bf16, on the weight's device; it goes on to require a gradient if it did.
            dtype: `compute_dtype`; the bias's, or the default dtype, where it is None.

        Raises:
            ValueError: tensors that do not fit together, values that kernels cannot trust (all of them are named).
        """
        options = SpQROptions(
            weight.bits, weight.group_size, weight.stats_group_size, weight.scale_bits, weight.zero_bits
        )
        dtype = bias.dtype if dtype is None and bias is not None else dtype
        out = cls(weight.k, weight.n, False, *options, device="meta", dtype=dtype)
        state = {name: getattr(weight, name) for name in TENSORS if getattr(weight, name) is not None}
        if bias is not None:
            state["bias"] = bias
        if errors := _tensor_errors(state, weight.k, weight.n, options):
            raise ValueError(f"SpQRLinear.from_weight: {'; '.join(errors)}")
        for name in TENSORS:
            out._buffers[name] = getattr(weight, name)
        out._copy_bias(bias)
        return out

    @property
    def packed_weight(self) -> SpQRWeight:
        """The weight: the module's own tensors, not copies."""
        tensors: dict[str, Any] = {name: self._buffers[name] for name in TENSORS}
        return SpQRWeight(self.out_features, self.in_features, *self.options, **tensors)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula: see `SpQRWeight.nominal_bits`."""
        return self.packed_weight.nominal_bits

    @property
    def outlier_count(self) -> int:
        """How many weights are stored apart."""
        return self.outliers.shape[0]

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.packed_weight.dequantize(dtype)

    def figures(self) -> dict[str, Any]:
        share = self.outlier_count / max(1, self.in_features * self.out_features)
        return {**super().figures(), "outlier_share": share}

    # ---- what files say of it ----------------------------------------------------------------------------------------

    def configuration(self) -> dict[str, Any]:
        found = {"bilevel": self.second_order is not None, "perm": self.perm is not None}
        return {**self._sizes(), **self.options._asdict(), **found, "outliers": self.outlier_count}

    @classmethod
    def from_configuration(cls, config: Mapping[str, Any], dtype: torch.dtype | None) -> SpQRLinear:
        n, k = config["out_features"], config["in_features"]
        return cls(k, n, config["bias"], *_options_of(config), device="meta", dtype=dtype)

    @classmethod
    def tensor_errors(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
        return _tensor_errors(state, config["in_features"], config["out_features"], _options_of(config))

    @classmethod
    def read_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        outliers = state["outliers"].shape[0] if "outliers" in state and state["outliers"].dim() else 0
        return {"bilevel": "second_order" in state, "perm": "perm" in state, "outliers": outliers}

    def forward(self, x: Tensor) -> Tensor:
        tensors = (
            self.codes, self.statistics, self.second_order, self.unit, self.outliers, self.row_offsets, self.perm,
        )  # fmt: skip
        sizes = (self.out_features, self.group_size, self.stats_group_size, self.scale_bits, self.zero_bits)
        return spqr_matmul_flat(x, tensors, self.bias, sizes)

    def _described(self) -> dict[str, Any]:
        text: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.second_order is not None:
            text |= {name: getattr(self, name) for name in ("stats_group_size", "scale_bits", "zero_bits")}
        return {**text, "outliers": self.outlier_count}
