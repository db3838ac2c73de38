"""Random SpQR weights of any shape and setting, for tests of kernels: every code and every bit field occurs."""

from __future__ import annotations

import torch
from octavo.spqr import SpQRWeight, packing


def random_weight(
    n: int,
    k: int,
    bits: int = 3,
    group_size: int = 16,
    stats_group_size: int = 16,
    scale_bits: int = 3,
    zero_bits: int = 3,
    bilevel: bool = True,
    outliers: float = 0.01,
    perm: bool = True,
    unit: float = 2.0**-12,
    seed: int = 0,
) -> SpQRWeight:
    g = torch.Generator().manual_seed(seed)
    groups = k // group_size
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    second = None
    if bilevel:
        fields = [torch.randint(0, 2**width, (n, groups), generator=g) for width in (scale_bits, zero_bits)]
        statistics = packing.pack_fields(*fields, scale_bits, zero_bits)
        shape = (-(-n // stats_group_size), groups)
        ss, sz = (torch.rand(shape, generator=g) + 0.5 for _ in range(2))
        zs, zz = (torch.randn(shape, generator=g) * 2 for _ in range(2))
        second = torch.stack((ss * 8, zs - 3, sz, zz), -1).half()
    else:
        scales, zeros = torch.rand(n, groups, generator=g) * 50, torch.randn(n, groups, generator=g) * 2 + 3
        statistics = packing.pack_plain(scales, zeros)
    mask = torch.rand(n, k, generator=g) < outliers
    if n > 2 and k and outliers:
        mask[1] = True  # a full row
        mask[2] = False
    values = torch.randn(int(mask.sum()), generator=g) * 300
    offsets = torch.zeros(n + 1, dtype=torch.int32)
    offsets[1:] = mask.sum(1).cumsum(0)
    return SpQRWeight(
        n, k, bits, group_size, stats_group_size, scale_bits, zero_bits,
        codes=packing.pack_codes(codes, bits),
        statistics=statistics,
        second_order=second,
        unit=torch.tensor([unit]),
        outliers=packing.pack_outliers(mask.nonzero()[:, 1], values, k),
        row_offsets=offsets,
        perm=packing.pack_perm(torch.randperm(k, generator=g)) if perm else None,
    )  # fmt: skip
