"""`Int8Linear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.checks import FLOATS, check_weight, dtype_name, name_of_dtype
from ..core.low_bit import LowBitLinear
from . import ops
from .bitsandbytes import read_linear8bit
from .functional import int8_matmul


def check_threshold(threshold: float) -> float:
    """The threshold as a float; ValueError unless it is 0 or positive and finite."""
    value = float(threshold)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"threshold must be 0 (no outlier columns) or a positive number, got {threshold}")
    return value


def _tensor_errors(state: Mapping[str, Tensor], in_features: int, out_features: int) -> list[str]:
    """List the errors of the tensors of an `Int8Linear`, one line each: dtype, shape, scales that are not finite."""
    n, k = out_features, in_features
    slots = state["outlier_weight"].shape[0] if "outlier_weight" in state and state["outlier_weight"].dim() else 0
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "weight": ((torch.int8,), (n, k)),
        "weight_scale": ((torch.float32,), (n,)),
        "bias": (FLOATS, (n,)),
        "outlier_slot": ((torch.int32,), (k,)),
        "outlier_weight": (FLOATS, (slots, n)),
    }
    errors = []
    for name, (dtypes, shape) in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            names = " or ".join(map(name_of_dtype, dtypes))
            errors.append(f"{name} must be {names} {list(shape)}, got {dtype_name(tensor)} {list(tensor.shape)}")
        elif tensor.is_meta:
            continue
        elif name in ("weight_scale", "outlier_weight"):
            if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
                errors.append(f"{name} has {bad} non-finite values of {tensor.numel()}")
            elif name == "weight_scale" and bool((tensor < 0).any()):
                errors.append(f"weight_scale has negative values, the least {tensor.min().item()}")
        elif name == "outlier_slot" and k and not -1 <= int(tensor.min()) <= int(tensor.max()) < slots:
            least, most = int(tensor.min()), int(tensor.max())
            errors.append(f"outlier_slot must lie in [-1, {slots}), got values from {least} to {most}")
    if ("outlier_slot" in state) != ("outlier_weight" in state):
        present = "outlier_slot" if "outlier_slot" in state else "outlier_weight"
        errors.append(f"outlier_slot and outlier_weight go together, got only {present}")
    return errors


def _column_ids(columns: Tensor | Sequence[int], k: int) -> Tensor:
    ids = torch.as_tensor(columns, device="cpu")
    if ids.numel() == 0:
        return torch.empty(0, dtype=torch.long)
    if ids.dtype.is_floating_point or ids.dtype is torch.bool or ids.dim() != 1:
        raise ValueError(f"keep_columns must be a list of column ids, got {dtype_name(ids)} {list(ids.shape)}")
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= k:
        raise ValueError(f"keep_columns must lie in [0, {k}), got ids from {least} to {most}")
    return torch.tensor(sorted(set(ids.tolist())))


def _narrowest(values: Tensor) -> Tensor:
    """values in the first of bf16, fp16 and their own dtype that holds them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if not values.is_meta and torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype)
    return values


class Int8Linear(LowBitLinear):
    """`torch.nn.Linear` with an int8 weight, computed by LLM.int8() (arXiv 2208.07339): see `octavo.int8_matmul`.

    ``y = x @ (weight * weight_scale[:, None]).T + bias``, with x quantized row by row to int8 except for its outlier
    columns, those with any ``|x| >= threshold``, which are multiplied in 16 bit. x is [..., in_features] in fp32, fp16
    or bf16 and y is [..., out_features] in the same dtype. Differentiable in x and bias; the weight is frozen.

    A new module is all zeros: fill it by `from_linear` or `load_state_dict`, which also reads the int8 state of
    bitsandbytes (`weight`, `SCB`, `weight_format` row). `.to(dtype)`, `.half()` and the like change only the bias: the
    quantized state keeps its dtypes.

    Attributes:
        weight: reads as the dequantized weight: see `octavo.core.low_bit.LowBitLinear`.
        codes: int8 [out_features, in_features], buffer; "weight" in state dicts.
        weight_scale: fp32 [out_features], buffer.
        bias: [out_features], parameter, or None.
        threshold: 0 (every column in int8) or positive; 6.0 in the paper.
        outlier_slot: int32 [in_features], buffer, or None: for columns whose unquantized weight was kept, its row in
            `outlier_weight`; else -1.
        outlier_weight: [kept columns, out_features], buffer, or None: used where such a column is an outlier column
            (the paper's form; without it the dequantized int8 weight is used).

    Raises:
        ValueError: a negative, NaN or infinite threshold.

    Example:
        >>> import octavo, torch
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = octavo.nn.Int8Linear.from_linear(linear, threshold=6.0)
        >>> layer
        Int8Linear(in_features=64, out_features=32, bias=True, threshold=6.0)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).norm() < 0.02 * linear(x).norm())
        True
    """

    tensors = ("weight", "weight_scale", "outlier_slot", "outlier_weight")
    flat_in_files = True
    optional: ClassVar[dict[str, str]] = {"outlier_slot": "kept_columns", "outlier_weight": "kept_columns"}
    fields: ClassVar[dict[str, Any]] = {"threshold": (int, float), "kept_columns": int}
    weight_scale: Tensor
    outlier_slot: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the bias's, and `compute_dtype`; the default dtype where it is None."""
        super().__init__(in_features, out_features, dtype)
        self.threshold = check_threshold(threshold)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.register_buffer("outlier_slot", None)
        self.register_buffer("outlier_weight", None)
        self._zero_bias(bias, device, dtype)

    @property
    def kept_columns(self) -> int:
        """How many columns keep their unquantized weight."""
        return 0 if self.outlier_weight is None else self.outlier_weight.shape[0]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, threshold: float = 6.0, keep_columns: Tensor | Sequence[int] | None = None
    ) -> Int8Linear:
        """Quantize a `torch.nn.Linear`, each row of its weight by its own absmax, from the dtype that it has.

        Args:
            linear: weight fp32, fp16 or bf16, on any device. It is not changed; the bias is copied.
            threshold: 0 or positive, for the new module.
            keep_columns: ids of columns whose weight is also kept as it is, for when they are outlier columns. It is
                stored in the narrowest of bf16, fp16 and fp32 that holds it exactly.

        Raises:
            ValueError: weights that are NaN or Inf or of another dtype, ids outside [0, in_features), the threshold.
        """
        check_weight(linear)
        weight = linear.weight.detach()
        out = cls(linear.in_features, linear.out_features, linear.bias is not None, threshold, "meta", weight.dtype)
        codes, out.weight_scale = ops.quantize_rowwise(weight)
        out._put("weight", codes)
        out._copy_bias(linear.bias)
        ids = _column_ids(() if keep_columns is None else keep_columns, linear.in_features)
        if len(ids):
            ids = ids.to(weight.device)
            slot = torch.full((linear.in_features,), -1, dtype=torch.int32, device=weight.device)
            slot[ids] = torch.arange(len(ids), dtype=torch.int32, device=weight.device)
            out.outlier_slot = slot
            out.outlier_weight = _narrowest(weight[:, ids].t().contiguous())
        return out.train(linear.training)

    def quantize_like(self, linear: nn.Linear) -> Int8Linear:
        kept = None if self.outlier_slot is None else (self.outlier_slot >= 0).nonzero().flatten()
        out = self.from_linear(linear, self.threshold, kept)
        self._frozen_bias_for(out)
        return out

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        weight = ops.dequantize_rowwise(self.codes, self.weight_scale, dtype)
        if self.outlier_slot is not None and self.outlier_weight is not None:  # kept columns are exact
            kept = self.outlier_slot >= 0
            weight[:, kept] = self.outlier_weight[self.outlier_slot[kept].long()].t().to(dtype)
        return weight

    @property
    def nominal_bits(self) -> float:
        """8: the paper does not count scales."""
        return 8.0

    def figures(self) -> dict[str, Any]:
        return {"kept_columns": self.kept_columns}

    # ---- what files say of it ----------------------------------------------------------------------------------------

    @classmethod
    def from_configuration(cls, config: Mapping[str, Any], dtype: torch.dtype | None) -> Int8Linear:
        n, k = config["out_features"], config["in_features"]
        return cls(k, n, config["bias"], config["threshold"], device="meta", dtype=dtype)

    @classmethod
    def check_configuration(cls, config: Mapping[str, Any]) -> None:
        check_threshold(config["threshold"])

    @classmethod
    def tensor_errors(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
        return _tensor_errors(state, config["in_features"], config["out_features"])

    @classmethod
    def read_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"kept_columns": len(state["outlier_weight"]) if "outlier_weight" in state else 0}

    @classmethod
    def recognizes(cls, stored: Mapping[str, torch.dtype]) -> bool:
        return stored.get("weight") is torch.int8

    @classmethod
    def unflattened(cls, state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        codes, sizes = state.get("weight"), (config["out_features"], config["in_features"])
        if codes is not None and codes.dim() == 1 and codes.numel() == sizes[0] * sizes[1]:
            return {**state, "weight": codes.view(sizes)}
        return state

    def _translate(self, state: dict[str, Tensor]) -> tuple[list[str], dict[str, Any]]:
        return read_linear8bit(state), {}

    def forward(self, x: Tensor) -> Tensor:
        return int8_matmul(
            x, self.codes, self.weight_scale, self.bias, self.threshold, self.outlier_slot, self.outlier_weight
        )

    def _described(self) -> dict[str, Any]:
        kept = {"kept_columns": self.kept_columns} if self.kept_columns else {}
        return {"threshold": self.threshold, **kept}
