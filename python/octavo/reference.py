"""What the operators compute, in plain PyTorch: same names, same signatures, float64 where the result is a float.

Codes, scales and integers are exact (the operators must give the same bits); products are float64 (the operators must
be as close to them as fp32 accumulation allows). Slow, and meant to be read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference_nf4 import code_book as code_book
from .reference_nf4 import nf4_dequantize as nf4_dequantize
from .reference_nf4 import nf4_linear as nf4_linear
from .reference_nf4 import nf4_linear_transposed as nf4_linear_transposed
from .reference_nf4 import nf4_quantize as nf4_quantize
from .reference_nf4 import normal_float as normal_float
from .reference_optim import mix_bits as mix_bits
from .reference_optim import optim_step as optim_step
from .reference_optim import optim_sums as optim_sums
from .reference_optim import optim_table as optim_table
from .reference_spqr import spqr_quantize_columns as spqr_quantize_columns
from .reference_states import dynamic_map as dynamic_map
from .reference_states import thresholds as thresholds
from .reference_tiles import spqr_dequantize as spqr_dequantize
from .reference_tiles import spqr_linear as spqr_linear

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


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0.0:
        raise RuntimeError(f"threshold must be 0 or positive, got {threshold}")


def quantize_rowwise(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    _check_threshold(threshold)
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
    _check_threshold(threshold)
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
    _check_threshold(threshold)
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


def _csr_rows(row_offsets: Tensor) -> Tensor:
    """The row of each entry."""
    offsets = row_offsets.long()
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())


def _csr_dense(values: Tensor, columns: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    dense = torch.zeros(len(row_offsets) - 1, k, dtype=torch.float64, device=values.device)
    column = columns.to(torch.int32).long()
    keep = (column >= 0) & (column < k)
    return dense.index_put((_csr_rows(row_offsets)[keep], column[keep]), values.double()[keep], accumulate=True)


def csr_matmul(
    values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None = None
) -> Tensor:
    out = x.double() @ _csr_dense(values, columns, row_offsets, x.shape[-1]).T
    return out if bias is None else out + bias.double()


def csr_matmul_add(out: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor) -> None:
    out.copy_(out.double() + csr_matmul(values, columns, row_offsets, x, len(row_offsets) - 1))


def csr_matmul_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, g: Tensor, k: int) -> Tensor:
    return g.double() @ _csr_dense(values, columns, row_offsets, k)


def csr_grad_values(
    columns: Tensor, row_offsets: Tensor, g: Tensor, x: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    whole = _rows(g.double()).T @ _rows(x.double())
    column, k = columns.to(torch.int32).long(), x.shape[-1]
    exists = (column >= 0) & (column < k)
    entries = torch.zeros(len(column), dtype=torch.float64, device=x.device)
    entries[exists] = whole[_csr_rows(row_offsets)[exists], column[exists]]
    return entries.to(dtype)


# ---- 8-bit blocks --------------------------------------------------------------------------------------------------

_MIN_BLOCK_ABSMAX = 2.0**-126


def _code_of(values: Tensor, code: Tensor) -> Tensor:
    return torch.searchsorted(thresholds(code), values.double().contiguous())


def quantize_blockwise(
    x: Tensor, blocksize: int = 256, signed: bool = True, code: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    book = dynamic_map(signed).to(x.device) if code is None else code
    flat = x.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = torch.where(blocks.isfinite(), blocks.abs(), 0.0).amax(1)
    absmax = torch.where(absmax < _MIN_BLOCK_ABSMAX, 0.0, absmax)
    inverse = torch.where(absmax == 0, 0.0, torch.div(torch.tensor(1.0), absmax))
    scaled = blocks * inverse[:, None]
    zero = _code_of(torch.zeros(1, device=x.device), book)
    codes = torch.where(scaled.isnan(), zero, _code_of(scaled.nan_to_num(nan=0.0, posinf=3e38, neginf=-3e38), book))
    return codes.flatten()[: len(flat)].view(x.shape).to(torch.uint8), absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 256,
    signed: bool = True,
    code: Tensor | None = None,
) -> Tensor:
    book = dynamic_map(signed).to(codes.device) if code is None else code
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return (book[codes.long()] * scale.view(codes.shape)).to(dtype)
