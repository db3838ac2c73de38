"""The operators on SpQR weights: see :mod:`octavo.ops`, which exports them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.fakes import fake


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
    """``x @ W.T + bias`` with an SpQR weight (arXiv 2306.03078, section 4.3), dequantized inside the product.

    ``W[i, perm[j]] = unit * (s[i, g] * (code[i, j] - z[i, g]) + outlier[i, j])`` with ``g = j // group_size``, where s
    and z are themselves quantized: ``s = (scale_code - zs) * ss``, ``z = (zero_code - zz) * sz``. The tensors are
    those of `octavo.spqr.SpQRWeight`, whose layout csrc/spqr/README.md gives to the bit; `octavo.spqr_matmul` takes
    them together. Accumulated in fp32 and rounded once. Up to 16 rows of x the weight enters exactly; with more it may
    be rounded to x's dtype first. A NaN or Inf in a row of x makes that row of y NaN or Inf, and no other.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        codes: int32 [ceil(n / 16), ceil(k / 32), bits, 16], bits 2, 3 or 4.
        statistics: uint8 [ceil(n / 16), k / group_size, 2 * (scale_bits + zero_bits)]; without second_order, fp16
            [ceil(n / 16), k / group_size, 2, 16]: scales and zero points.
        second_order: fp16 [ceil(n / stats_group_size), k / group_size, 4]: ss, zs, sz, zz; or None.
        unit: fp32 [1].
        outliers: int32 [count, 1], for k > 65536 [count, 2]. Their columns must be in [0, k) and row_offsets ascend
            from 0 to count, perm must be a permutation: `SpQRWeight.validate` checks that, the operator does not.
        row_offsets: int32 [n + 1].
        perm: int32 [ceil(k / 2)], for k > 65536 [k], or None for the identity.
        bias: [n], fp32, fp16 or bf16, or None.
        n: output features.
        group_size: 16, 32 or 64, a divisor of k.
        stats_group_size: a multiple of 16.
        scale_bits, zero_bits: 1 to 4.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, sizes that are not supported.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> w = SpQRWeight.pack(quantize_weight(torch.ones(16, 32), None, settings))
        >>> tensors = (w.codes, w.statistics, w.second_order, w.unit, w.outliers, w.row_offsets, w.perm)
        >>> octavo.ops.spqr_linear(torch.ones(2, 32), *tensors, bias=None, n=16, group_size=16).shape
        torch.Size([2, 16])
    """
    return torch.ops.octavo.spqr_linear(
        x, codes, statistics, second_order, unit, outliers, row_offsets, perm, bias, n, group_size, stats_group_size,
        scale_bits, zero_bits,
    )  # fmt: skip


@fake("spqr_linear")
def _(
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
    return x.new_empty((*x.shape[:-1], n))


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
    """The weight that `spqr_linear` multiplies by, in the order of its own columns, rounded once to `dtype`.

    Args: as for `spqr_linear`; k is the input features and dtype fp32, fp16 or bf16.

    Returns:
        [n, k], `dtype`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, sizes that are not supported.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> w = SpQRWeight.pack(quantize_weight(torch.ones(16, 32), None, settings))
        >>> tensors = (w.codes, w.statistics, w.second_order, w.unit, w.outliers, w.row_offsets, w.perm)
        >>> octavo.ops.spqr_dequantize(*tensors, n=16, k=32, dtype=torch.float32, group_size=16).shape
        torch.Size([16, 32])
    """
    return torch.ops.octavo.spqr_dequantize(
        codes, statistics, second_order, unit, outliers, row_offsets, perm, n, k, dtype, group_size, stats_group_size,
        scale_bits, zero_bits,
    )  # fmt: skip


@fake("spqr_dequantize")
def _(
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
    return codes.new_empty((n, k), dtype=dtype)


def spqr_quantize_columns(
    weight: Tensor,
    factor: Tensor,
    threshold: float,
    bits: int,
    group_size: int,
    stats_group_size: int = 16,
    scale_bits: int = 0,
    zero_bits: int = 0,
    leave_one_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize one block of columns (SpQR, arXiv 2306.03078, Algorithm 1; without outliers and second level, GPTQ's).

    Column by column: ``code = clamp(round_half_even(w / scale + zero), 0, 2**bits - 1)``, the dense value is
    ``scale * (code - zero)``, ``e = (w - value) / factor[j, j]``. Where ``e**2 > threshold`` the weight is an outlier:
    its residual ``w - value`` is kept as fp16 and added, and e is what remains. Then ``w[:, l] -= e * factor[j, l]``
    for the columns l after it. Every `group_size` columns scale and zero are fitted per row to the weights as they then
    are: ``scale = (max - min) / (2**bits - 1)``, ``zero = -min / scale``, where `leave_one_out` leaves out those
    weights without which the group's loss ``sum e**2`` is lower by more than the threshold.

    A group more than 16 of its ranges away from 0 (one with a second level, where a zero point far from the others
    would cost them theirs), constant ones included, is fitted with 0 in its range: a constant is code 0 or the
    highest. Scales that are not positive give value 0, or nearly.

    Args:
        weight: fp32 [n, k], finite, k a multiple of group_size and at most 128; a CPU tensor. The errors of columns
            before this block are in it already.
        factor: fp32 [k, k], the block of U on the diagonal, where ``U^T U`` is the inverse Hessian and U is upper
            triangular with a positive diagonal. What is below the diagonal is not read.
        threshold: of squared errors; inf for no outliers.
        bits: 1 to 8 per code.
        group_size: columns that share scale and zero, per row.
        stats_group_size: rows that share statistics of the second level; a multiple of 16.
        scale_bits, zero_bits: of the codes of scales and zeros, together at most 8; 0 and 0: no second level.
        leave_one_out: see above; no effect without outliers.

    Returns:
        codes: uint8 [n, k].
        scales, zeros: fp16 [n, groups]; with a second level uint8 codes of them, ``(code - zero) * scale``.
        second_order: fp16 [ceil(n / stats_group_size), groups, 4]: scale and zero of the scales, then of the zeros; no
            elements without a second level. Where a tile's statistics are equal, or so close that fp16 cannot tell
            them apart, scale is their middle, zero 0, and the codes 1.
        residual: fp16 [n, k], 0 where no outlier is.
        error: fp32 [n, k], e of the result: subtract ``error @ U[block, after]`` from the columns after the block. A
            row whose weights, statistics or residuals exceed fp16, or are NaN, has an error that is NaN or Inf, and no
            meaning; nor have the rows that share its statistics.

    Example:
        >>> import octavo, torch
        >>> weight = torch.arange(16.0).repeat(16, 1)
        >>> result = octavo.ops.spqr_quantize_columns(weight, torch.eye(16), float("inf"), bits=4, group_size=16)
        >>> result[0][0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        >>> result[1][0], result[2][0]
        (tensor([1.], dtype=torch.float16), tensor([0.], dtype=torch.float16))
    """
    return torch.ops.octavo.spqr_quantize_columns(
        weight, factor, threshold, bits, group_size, stats_group_size, scale_bits, zero_bits, leave_one_out
    )


@fake("spqr_quantize_columns")
def _(
    weight: Tensor,
    factor: Tensor,
    threshold: float,
    bits: int,
    group_size: int,
    stats_group_size: int = 16,
    scale_bits: int = 0,
    zero_bits: int = 0,
    leave_one_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    groups, tiles = k // group_size, (n + stats_group_size - 1) // stats_group_size if scale_bits else 0
    statistic = torch.uint8 if scale_bits else torch.float16
    return (
        weight.new_empty((n, k), dtype=torch.uint8),
        weight.new_empty((n, groups), dtype=statistic),
        weight.new_empty((n, groups), dtype=statistic),
        weight.new_empty((tiles, groups, 4), dtype=torch.float16),
        weight.new_empty((n, k), dtype=torch.float16),
        weight.new_empty((n, k)),
    )
