"""Modules over :mod:`octavo.autograd`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ops
from ._frozen import FLOATS as _FLOATS
from ._frozen import FrozenBuffers
from ._frozen import dtype_name as _dtype
from .autograd import int8_matmul
from .nn_attention import SwitchBackMultiheadAttention
from .nn_lora import LoRALinear
from .nn_nf4 import NF4Linear
from .nn_spqr import SpQRLinear
from .nn_switchback import LayerScale, SwitchBackLinear

__all__ = [
    "Int8Linear",
    "LayerScale",
    "LoRALinear",
    "NF4Linear",
    "SpQRLinear",
    "StableEmbedding",
    "SwitchBackLinear",
    "SwitchBackMultiheadAttention",
    "check_state",
    "check_threshold",
    "check_weight",
]


def check_threshold(threshold: float) -> float:
    """The threshold as a float; ValueError unless it is 0 or positive and finite."""
    value = float(threshold)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"threshold must be 0 (no outlier columns) or a positive number, got {threshold}")
    return value


def check_weight(linear: nn.Linear, name: str = "") -> None:
    """ValueError unless `linear` can be quantized: weight and bias fp32, fp16 or bf16, the weight all finite."""
    where = f"{name}: {linear}" if name else str(linear)
    weight = linear.weight.detach()
    if weight.dtype not in _FLOATS:
        raise ValueError(f"{where}: the weight must be float32, float16 or bfloat16, got {_dtype(weight)}")
    if linear.bias is not None and linear.bias.dtype not in _FLOATS:
        raise ValueError(f"{where}: the bias must be float32, float16 or bfloat16, got {_dtype(linear.bias)}")
    if not weight.is_meta and (bad := weight.numel() - int(torch.isfinite(weight).sum())):
        raise ValueError(f"{where}: {bad} of {weight.numel()} weights are NaN or Inf")


def check_state(state: Mapping[str, Tensor], in_features: int, out_features: int) -> list[str]:
    """What is wrong with the tensors of an `Int8Linear`, one line each: dtype, shape, scales that are not finite."""
    n, k = out_features, in_features
    slots = state["outlier_weight"].shape[0] if "outlier_weight" in state and state["outlier_weight"].dim() else 0
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "weight": ((torch.int8,), (n, k)),
        "weight_scale": ((torch.float32,), (n,)),
        "bias": (_FLOATS, (n,)),
        "outlier_slot": ((torch.int32,), (k,)),
        "outlier_weight": (_FLOATS, (slots, n)),
    }
    errors = []
    for name, (dtypes, shape) in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            errors.append(f"{name} must be {names} {list(shape)}, got {_dtype(tensor)} {list(tensor.shape)}")
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
        raise ValueError(f"keep_columns must be a list of column ids, got {_dtype(ids)} {list(ids.shape)}")
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


class Int8Linear(FrozenBuffers):
    """`torch.nn.Linear` with an int8 weight, computed by LLM.int8() (arXiv 2208.07339): see `octavo.int8_matmul`.

    ``y = x @ (weight * weight_scale[:, None]).T + bias``, with x quantized row by row to int8 except for its outlier
    columns, those with any ``|x| >= threshold``, which are multiplied in 16 bit. x is [..., in_features] in fp32, fp16
    or bf16 and y is [..., out_features] in the same dtype. Differentiable in x and bias; the weight is frozen.

    A new module is all zeros: fill it by `from_linear` or `load_state_dict`, which also reads the int8 state of
    bitsandbytes (`weight`, `SCB`, `weight_format` row). `.to(dtype)`, `.half()` and the like change only the bias: the
    quantized state keeps its dtypes.

    Attributes:
        weight: int8 [out_features, in_features], buffer.
        weight_scale: fp32 [out_features], buffer.
        bias: [out_features], parameter, or None.
        threshold: 0 (every column in int8) or positive; 6.0 in the paper.
        outlier_slot: int32 [in_features], buffer, or None: for columns whose unquantized weight was kept, its row in
            `outlier_weight`; else -1.
        outlier_weight: [kept columns, out_features], buffer, or None: used where such a column is an outlier column
            (the paper's form; without it the dequantized int8 weight is used).

    Raises:
        ValueError: a negative, NaN or infinite threshold.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
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
        """`dtype` is the bias's; the default dtype where it is None."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = check_threshold(threshold)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.register_buffer("outlier_slot", None)
        self.register_buffer("outlier_weight", None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

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
        out = cls(linear.in_features, linear.out_features, linear.bias is not None, threshold, "meta")
        out.weight, out.weight_scale = ops.quantize_rowwise(weight)
        if linear.bias is not None:
            out.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        ids = _column_ids(() if keep_columns is None else keep_columns, linear.in_features)
        if len(ids):
            ids = ids.to(weight.device)
            slot = torch.full((linear.in_features,), -1, dtype=torch.int32, device=weight.device)
            slot[ids] = torch.arange(len(ids), dtype=torch.int32, device=weight.device)
            out.outlier_slot = slot
            out.outlier_weight = _narrowest(weight[:, ids].t().contiguous())
        return out.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the weight that this module stands for; kept columns are exact.

        Args:
            dtype: of weight and bias; None for the bias's dtype, or the default dtype where there is no bias.
        """
        dtype = dtype or (torch.get_default_dtype() if self.bias is None else self.bias.dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = ops.dequantize_rowwise(self.weight, self.weight_scale, dtype)
        if self.outlier_slot is not None and self.outlier_weight is not None:
            kept = self.outlier_slot >= 0
            weight[:, kept] = self.outlier_weight[self.outlier_slot[kept].long()].t().to(dtype)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return int8_matmul(
            x, self.weight, self.weight_scale, self.bias, self.threshold, self.outlier_slot, self.outlier_weight
        )

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", threshold={self.threshold}"
        return f"{text}, kept_columns={self.kept_columns}" if self.kept_columns else text

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
        errors = read_linear8bit(state)
        errors += check_state(state, self.in_features, self.out_features)
        if errors:
            where = f"{type(self).__name__} {prefix[:-1]!r}" if prefix else type(self).__name__
            error_msgs.extend(f"{where}: {error}" for error in errors)
            return
        for name in ("outlier_slot", "outlier_weight"):  # a new weight brings its kept columns, or that it has none
            current, new = self._buffers[name], state.get(name)
            if new is None:
                self._buffers[name] = None if "weight" in state else current
            elif current is None or current.shape != new.shape or current.dtype is not new.dtype:
                self._buffers[name] = torch.empty_like(new, device=self.weight.device)
        state = {prefix + name: value for name, value in state.items()}
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class StableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` followed by layer normalization (arXiv 2110.02861, section 2.3): for stable training with
    8-bit optimizers.

    ``y = layer_norm(weight[ids])``, the weight drawn from the Xavier uniform distribution, whose values are smaller
    than those of a normal one. The gradient of an embedding is uneven (rows come up as often as their words), so
    octavo's optimizers keep fp32 states for the weight: it carries the attribute ``octavo_state_bits = 32``, which
    survives copies, moves, `load_state_dict` and FSDP2's sharding.

    Attributes:
        weight: [num_embeddings, embedding_dim], as in torch; so are the arguments.
        norm: `torch.nn.LayerNorm` over embedding_dim.
    """

    norm: nn.LayerNorm

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()
        if "norm" in self._modules:
            self.norm.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.norm(super().forward(input)))

    # The mark belongs to a Parameter, and these are the ways in which a module gets another one.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def _mark(self) -> None:
        if (weight := self._parameters.get("weight")) is not None:
            weight.octavo_state_bits = 32  # type: ignore[attr-defined]


def read_linear8bit(state: dict[str, Tensor]) -> list[str]:
    """Turn the int8 state of bitsandbytes, if it is that, into ours in place: weight * SCB / 127 is the weight."""
    layouts = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}
    layout = state.pop("weight_format", None)
    if layout is not None and (code := int(layout)) != 0:
        return [
            f"weight_format is {code} ({layouts.get(code, 'unknown')}); only 0 (row) can be read. Load the checkpoint "
            "with the bitsandbytes that wrote it and save it again in row format"
        ]
    if "SCB" in state and "weight_scale" not in state:
        scb = state.pop("SCB")
        if scb.dtype is not torch.float32:
            return [f"SCB must be float32, got {_dtype(scb)} {list(scb.shape)}"]
        state["weight_scale"] = scb / 127.0
    return []
