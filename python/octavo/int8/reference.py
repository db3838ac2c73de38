"""The operators in plain PyTorch: same names, same signatures, float64 where the result is a float.

Codes, scales and integers are exact (the operators must give the same bits); products are float64 (the operators must
be as close to them as fp32 accumulation allows). Slow, and meant to be read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.hashing import mix_bits

_MIN_ABSMAX = 2.0**-120


def _scales(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """scale = absmax / 127 and 127 / absmax, both rounded once to fp32, with the meaning of special values."""
    tiny, bad = absmax < _MIN_ABSMAX, ~torch.isfinite(absmax)
    scale = torch.where(tiny, 0.0, absmax / 127.0).masked_fill(bad, torch.nan)
    # A tensor / tensor division: Python's 127.0 / absmax would be absmax.reciprocal() * 127, rounded twice.
    return scale, torch.where(tiny | bad, 0.0, torch.div(torch.tensor(127.0), absmax))


def _encode(x: Tensor, inverse: Tensor, drop: Tensor) -> Tensor:
    codes = torch.round(x * inverse).clamp(-127, 127)
    return codes.masked_fill(drop | (inverse == 0), 0).to(torch.int8)


def _absmax(x: Tensor, dim: int) -> Tensor:
    """A maximum that keeps NaN, and is 0 over an empty dimension."""
    return x.abs().amax(dim) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim:][1:])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_threshold(threshold: float) -> float:
    """The threshold in fp32, as it is compared with; a positive one stays positive."""
    if not threshold >= 0.0:
        raise RuntimeError(f"threshold must be 0 or positive, got {threshold}")
    return float(torch.tensor(threshold, dtype=torch.float32)) or 2.0**-149 * (threshold > 0)


def quantize_rowwise(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    threshold = _check_threshold(threshold)
    values = x.float()
    outlier = values.abs() >= threshold if threshold > 0 else torch.zeros_like(values, dtype=torch.bool)
    absmax = _absmax(values.masked_fill(outlier, 0.0), x.dim() - 1)
    scale, inverse = _scales(absmax)
    return _encode(values, inverse[..., None], outlier), scale


def dequantize_rowwise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (codes.float() * scale[..., None]).to(dtype)


def quantize_columnwise(x: Tensor) -> tuple[Tensor, Tensor]:
    values = _rows(x.float())
    scale, inverse = _scales(_absmax(values, 0))
    return _encode(values, inverse, torch.zeros_like(values, dtype=torch.bool)).reshape(x.shape), scale


def quantize_tensorwise(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.float()
    scale, inverse = _scales(_absmax(values.reshape(-1), 0))
    return _encode(values, inverse, torch.zeros_like(values, dtype=torch.bool)), scale


def quantize_rowwise_columnwise(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*quantize_rowwise(x), *quantize_columnwise(x))


def quantize_tensorwise_transpose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = quantize_tensorwise(x)
    return codes, _rows(codes).t().contiguous(), scale


def quantize_columnwise_transpose(x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values = _rows(x.float())
    scale, inverse = _scales(_absmax(values, 0))
    if seed is None:
        codes = _encode(values, inverse, torch.zeros_like(values, dtype=torch.bool))
    else:
        uniform = (_element_bits(int(seed), *values.shape) >> 8).float().to(x.device) * 2.0**-24
        codes = torch.floor(values * inverse + uniform).clamp(-127, 127)
        codes = codes.masked_fill(inverse == 0, 0).to(torch.int8)
    return codes.t().contiguous(), scale


def _element_bits(seed: int, rows: int, cols: int) -> Tensor:
    """32 random bits for each element of a matrix (csrc/common/random.h), in int64."""
    seed &= (1 << 64) - 1
    key = mix_bits(mix_bits((seed & 0xFFFFFFFF) + 0x9E3779B9 & 0xFFFFFFFF) ^ seed >> 32)
    of_row = mix_bits(torch.arange(rows)[:, None] ^ key)
    return mix_bits(of_row + torch.arange(cols) & 0xFFFFFFFF)


def quantize_rowwise_columnwise_transpose(
    x: Tensor, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*quantize_rowwise(x), *quantize_columnwise_transpose(x, seed))


def find_outlier_columns(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    threshold = _check_threshold(threshold)
    k = x.shape[-1]
    found = (_rows(x.float()).abs() >= threshold).any(0).nonzero().flatten()
    columns = torch.full((k,), -1, dtype=torch.int32, device=x.device)
    columns[: len(found)] = found.int()
    return columns, torch.tensor([len(found)], dtype=torch.int32, device=x.device)


def extract_columns(x: Tensor, columns: Tensor, count: Tensor) -> Tensor:
    k, slots = x.shape[-1], torch.arange(len(columns), device=x.device)
    valid = (slots < count) & (columns >= 0) & (columns < k)
    if k == 0:
        return x.new_zeros((*x.shape[:-1], len(columns)))
    return x[..., columns.long().clamp(0, k - 1)].masked_fill(~valid, 0)


def extract_int8_columns(
    weight: Tensor, weight_scale: Tensor, columns: Tensor, count: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    return extract_columns(dequantize_rowwise(weight, weight_scale, dtype), columns, count)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T).to(torch.int32)


def int8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float64,
) -> Tensor:
    scale = a_scale.double()[..., None] if a_scale.numel() != 1 else a_scale.double().reshape(())
    out = (a.double() @ b.double().T) * scale * b_scale.double()
    return (out if bias is None else out + bias.double()).to(out_dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    outlier_slot: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    is_outlier = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    threshold = _check_threshold(threshold)
    if threshold > 0:
        is_outlier = (_rows(x.float()).abs() >= threshold).any(0)
    codes, scale = quantize_rowwise(x.masked_fill(is_outlier, 0.0))
    full_weight = weight.double() * weight_scale.double()[:, None]
    if outlier_slot is not None and outlier_weight is not None:
        kept = outlier_slot >= 0
        full_weight[:, kept] = outlier_weight.double()[outlier_slot[kept].long()].T
    out = int8_gemm(codes, weight, scale, weight_scale, bias)
    return out + x.double()[..., is_outlier] @ full_weight[:, is_outlier].T


# ---- sparse matrices in compressed rows ----------------------------------------------------------------------------


# ---- 8-bit blocks --------------------------------------------------------------------------------------------------
