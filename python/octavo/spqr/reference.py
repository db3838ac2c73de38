"""References of the operators on SpQR weights, by unpacking: any device, fp32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing
from .reference_columns import spqr_quantize_columns as spqr_quantize_columns


def _statistics(
    statistics: Tensor, second_order: Tensor | None, n: int, stats_group_size: int, scale_bits: int, zero_bits: int
) -> tuple[Tensor, Tensor]:
    if second_order is None:
        scales, zeros = packing.unpack_plain(statistics, n)
        return scales.float(), zeros.float()
    scale_codes, zero_codes = packing.unpack_fields(statistics, n, scale_bits, zero_bits)
    second = second_order.float().repeat_interleave(stats_group_size, 0)[:n]
    ss, zs, sz, zz = second.unbind(-1)
    return (scale_codes - zs) * ss, (zero_codes - zz) * sz


def spqr_dequantize(
    codes: Tensor,
    statistics: Tensor,
    second_order: Tensor | None,
    unit: Tensor,
    outliers: Tensor,
    row_offsets: Tensor,
    perm: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
    group_size: int,
    stats_group_size: int = 16,
    scale_bits: int = 3,
    zero_bits: int = 3,
) -> Tensor:
    scales, zeros = _statistics(statistics, second_order, n, stats_group_size, scale_bits, zero_bits)
    scales, zeros = (t.repeat_interleave(group_size, 1) for t in (scales, zeros))
    weight = scales * (packing.unpack_codes(codes, n, k).float() - zeros)
    columns, values = packing.unpack_outliers(outliers)
    rows = torch.repeat_interleave(torch.arange(n, device=codes.device), row_offsets.long().diff())
    weight[rows, columns] += values.float()
    weight = weight * unit
    if perm is not None:
        weight = weight[:, packing.unpack_perm(perm, k).argsort()]
    return weight.to(dtype)


def spqr_linear(
    x: Tensor,
    codes: Tensor,
    statistics: Tensor,
    second_order: Tensor | None,
    unit: Tensor,
    outliers: Tensor,
    row_offsets: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    stats_group_size: int = 16,
    scale_bits: int = 3,
    zero_bits: int = 3,
) -> Tensor:
    weight = spqr_dequantize(
        codes, statistics, second_order, unit, outliers, row_offsets, perm, n, x.shape[-1], torch.float32, group_size,
        stats_group_size, scale_bits, zero_bits,
    )  # fmt: skip
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)
