"""`SpQRCodes`: a quantized weight before it is packed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpQRCodes:
    """What `SpQRWeight.pack` packs, columns in the quantizer's order; the names are those of csrc/spqr/README.md.

    Attributes:
        codes: uint8 [n, k].
        scale_codes, zero_codes: uint8 [n, k / group_size], with second_order.
        second_order: fp16 [ceil(n / stats_group_size), k / group_size, 4]: ss, zs, sz, zz.
        scales, zeros: fp16 [n, k / group_size], without it.
        unit: fp32 [1].
        row_offsets: int32 [n + 1].
        outlier_columns, outlier_values: int32 and fp16 [count], by row and in it by column; what is missing to the
            weight, in units.
        perm: int32 [k], or None.
    """

    n: int
    k: int
    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int
    codes: Tensor
    scale_codes: Tensor | None
    zero_codes: Tensor | None
    second_order: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    unit: Tensor
    row_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    perm: Tensor | None
