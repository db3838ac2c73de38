"""The operators on SpQR weights: see :mod:`octavo.ops`, which exports them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._fakes import check_devices, fake


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
    check_devices("spqr_linear", x, codes, statistics, second_order, unit, outliers, row_offsets, perm, bias)
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
    check_devices("spqr_dequantize", codes, statistics, second_order, unit, outliers, row_offsets, perm)
    return codes.new_empty((n, k), dtype=dtype)
