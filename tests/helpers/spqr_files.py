"""Random layers in the formats of the SpQR authors, written to the letter, and the weight that the formats define."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from octavo.spqr import SpQRWeight
from torch import Tensor


def layer(
    m: int = 48,
    n: int = 96,
    bits: int = 3,
    group: int = 16,
    rows: int = 16,
    dtype: torch.dtype = torch.float16,
    bilevel: bool = True,
    outliers: float = 0.02,
    scale: float = 0.02,
    seed: int = 0,
) -> dict[str, Any]:
    """Random parts of one layer, in the legacy format: a weight of about `scale`, permuted."""
    g = torch.Generator().manual_seed(seed)
    groups = n // group
    codes = torch.randint(0, 2**bits, (m, n), generator=g, dtype=torch.int8)
    mask = torch.rand(m, n, generator=g) < outliers
    if outliers:
        mask[1], mask[2] = True, False  # a full row, an empty one
    values = torch.where(mask, torch.randn(m, n, generator=g) * 5 * scale, 0.0).to(dtype)
    out: dict[str, Any] = {"quant_weights": codes, "outliers_matrix": values.to_sparse()}
    out["perm"] = torch.randperm(n, generator=g).int()
    names = [f"quant_layer_{kind}_qq_{part}" for kind in ("scale", "zero") for part in ("scale", "zero")]
    if bilevel:
        for name in ("quant_layer_scale", "quant_layer_zeros"):
            statistics = torch.randint(0, 8, (groups, m // rows, rows), generator=g, dtype=torch.int8)
            out[name] = list(statistics)
        sizes = (scale / 20, 4.0, 0.3, 3.0)
        for name, size in zip(names, sizes, strict=True):
            values = (torch.rand(groups, m // rows, 1, generator=g) + 0.5) * size
            out[name] = list((values if name.endswith("scale_qq_scale") else values - size).to(dtype))
        out["quant_layer_zero_qq_scale"] = [t + 0.5 for t in out["quant_layer_zero_qq_scale"]]
    else:
        out["quant_layer_scale"] = list(((torch.rand(groups, m, 1, generator=g) + 0.1) * scale / 5).to(dtype))
        out["quant_layer_zeros"] = list((torch.randn(groups, m, 1, generator=g) + 3).to(dtype))
        out |= {name: [] for name in names}
    other = {"save_float_dtype": dtype, "weight_shape": torch.Size((m, n)), "groupsize": group, "blocksize": 128}
    return out | other | {"keep_last_columns": 0, "sublayer_name": "self_attn.q_proj"}


def dense(l: dict[str, Any]) -> np.ndarray:  # noqa: E741
    """s * (q - z) in float64, in permuted order."""

    def columns(name: str) -> np.ndarray:
        return np.stack([t.double().numpy() for t in l[name]])  # groups, rows / beta2, beta2 or 1

    s, z = columns("quant_layer_scale"), columns("quant_layer_zeros")
    if l["quant_layer_scale_qq_scale"]:
        s = columns("quant_layer_scale_qq_scale") * (s - columns("quant_layer_scale_qq_zero"))
        z = columns("quant_layer_zero_qq_scale") * (z - columns("quant_layer_zero_qq_zero"))
    q = l["quant_weights"].double().numpy()
    s, z = (t.reshape(len(t), -1).T.repeat(l["groupsize"], 1) for t in (s, z))
    return s * (q - z)


def defined(l: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:  # noqa: E741
    """The weight that the quantizer chose, and how far rounding may take the import from it."""
    plain, outliers = dense(l), l["outliers_matrix"].to_dense().double().numpy()
    weight = plain * (outliers == 0) + outliers
    bound = np.where(outliers == 0, 0.0, np.abs(outliers - plain) * 2.0**-11)
    order = np.argsort(l["perm"].numpy())
    return weight[:, order], bound[:, order]


def assert_defined(got: SpQRWeight, l: dict[str, Any], statistics: float = 0.0) -> None:  # noqa: E741
    """fp32 has three roundings of sums and products; `statistics`: of second-order numbers that fp16 cannot have."""
    assert got.validate() == []
    weight, bound = defined(l)
    unit, top = float(got.unit), np.abs(weight).max()
    error = np.abs(got.dequantize().double().numpy() - weight)
    fp32 = (np.abs(dense(l)).max() + top) * 2.0**-20
    assert bool((error <= bound + fp32 + statistics * top + unit * 2.0**-24).all()), error.max()
    assert top / unit < 2**14
    outliers = l["outliers_matrix"].to_dense()
    assert got.outlier_count == int((outliers != 0).sum())


def compressed(l: dict[str, Any], ptcsr: bool = False) -> dict[str, Tensor]:  # noqa: E741
    """The kernel's format, word by word: 3-bit codes, 16 x 16 tiles."""
    m, n = l["quant_weights"].shape
    q = l["quant_weights"].tolist()
    words = []
    for ti in range(m // 16):
        for tj in range(n // 16):

            def half(name: str, ti: int = ti, tj: int = tj) -> bytes:
                return struct.pack("<e", float(l[f"quant_layer_{name}"][tj][ti, 0]))

            record = half("scale_qq_scale") + half("zero_qq_scale") + half("scale_qq_zero") + half("zero_qq_zero")
            for r in range(16):
                word = int(l["quant_layer_scale"][tj][ti, r]) | int(l["quant_layer_zeros"][tj][ti, r]) << 3
                for c in range(16):
                    word |= q[16 * ti + r][16 * tj + c] << (6 + 3 * c)
                words.append(word | record[r // 2] << 54)
    outliers = l["outliers_matrix"].to_dense().half()
    rows = [[(c, float(outliers[i, c])) for c in outliers[i].nonzero().flatten().tolist()] for i in range(m)]

    def entry(column: int, value: float) -> int:
        return int.from_bytes(struct.pack("<He", column, value), "little", signed=True)

    offsets, entries = [0], []
    if ptcsr:
        for begin in range(0, m, 16):
            most = max(len(row) for row in rows[begin : begin + 16])
            for e in range(most):
                entries += [entry(*row[e]) if e < len(row) else 0 for row in rows[begin : begin + 16]]
            offsets.append(len(entries))
    else:
        for row in rows:
            entries += [entry(*e) for e in row]
            offsets.append(len(entries))
    pairs = [
        int.from_bytes(struct.pack("<HH", *pair), "little", signed=True) for pair in l["perm"].view(-1, 2).tolist()
    ]
    return {
        "dense_weights": torch.tensor(words, dtype=torch.int64),
        "row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "col_vals": torch.tensor(entries, dtype=torch.int32),
        "in_perm": torch.tensor(pairs, dtype=torch.int32),
    }
