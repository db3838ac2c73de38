"""One layer of the SpQR authors' formats, as an `SpQRWeight`: see :mod:`octavo.integrations.spqr`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spqr.engine.codes import SpQRCodes
from ..spqr.weight import SpQRWeight

_TILE = 16  # rows and columns that the compressed format keeps together
_LEGACY = ("quant_layer_scale", "quant_layer_zeros")
_SECOND = tuple(f"quant_layer_{kind}_qq_{part}" for kind in ("scale", "zero") for part in ("scale", "zero"))


# ---- one layer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """A weight as their quantizer leaves it, columns in its order. Statistics are fp32, of the weight itself."""

    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int
    codes: Tensor  # [n, k]
    scales: Tensor  # [n, groups]: codes, or without second_order values
    zeros: Tensor
    second_order: Tensor | None  # [n / stats_group_size, groups, 4]: ss, zs, sz, zz
    rows: Tensor  # of the outliers, with columns and whole values
    columns: Tensor
    values: Tensor
    perm: Tensor | None

    def statistics(self, second_order: Tensor | None, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        if second_order is None:
            return scales.float(), zeros.float()
        second = second_order.float().repeat_interleave(self.stats_group_size, 0)[: len(self.codes)]
        ss, zs, sz, zz = second.unbind(-1)
        return (scales - zs) * ss, (zeros - zz) * sz

    def bound(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """No code gives more than this, [n, groups]."""
        return scales.abs() * torch.maximum(zeros.abs(), (2**self.bits - 1 - zeros).abs())


def _fp16(what: str, values: Tensor) -> Tensor:
    out = values.half()
    if bad := int((~out.isfinite()).sum()):
        worst = values[~out.isfinite()].abs().max().item()
        raise ValueError(
            f"{what}: {bad} of {values.numel()} are beyond fp16's range, NaN or Inf; the largest is {worst}"
        )
    return out


def _unit(top: float, least: float) -> float:
    """A power of two: top, the largest weight, is below 2**12 units; up to 2**14 where that keeps least normal."""
    if top == 0.0:
        return 1.0
    exponent = math.frexp(top)[1] - 12
    if least > 0.0:
        exponent = max(exponent - 2, min(exponent, math.frexp(least)[1] - 1 + 14))
    return math.ldexp(1.0, max(exponent, -126))


def _pack(p: _Parts) -> SpQRWeight:
    n, k = p.codes.shape
    whole = p.statistics(p.second_order, p.scales, p.zeros)
    if not all(bool(t.isfinite().all()) for t in (*whole, p.values)):
        raise ValueError("scales, zero points or outliers are NaN or Inf")
    tops = [t.abs().max().item() for t in (p.bound(*whole), p.values) if t.numel()]
    scales = p.scales if p.second_order is None else p.second_order[..., 0]
    nonzero = scales.abs()[scales != 0]
    unit = _unit(max(tops, default=0.0), nonzero.min().item() if nonzero.numel() else 0.0)
    if p.second_order is None:
        second, scales, zeros = None, _fp16("scales", p.scales / unit), _fp16("zero points", p.zeros)
    else:
        ss, zs, sz, zz = p.second_order.unbind(-1)
        second = _fp16("statistics of the second order", torch.stack((ss / unit, zs, sz, zz), -1))
        scales, zeros = p.scales, p.zeros
    order = (p.rows * k + p.columns).argsort()
    rows, columns = p.rows[order], p.columns[order]
    s, z = (t[rows, columns // p.group_size] for t in p.statistics(second, scales, zeros))
    missing = p.values[order].double() / unit - (s * (p.codes[rows, columns].float() - z)).double()
    offsets = torch.zeros(n + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    codes = SpQRCodes(
        n=n,
        k=k,
        bits=p.bits,
        group_size=p.group_size,
        stats_group_size=p.stats_group_size,
        scale_bits=p.scale_bits,
        zero_bits=p.zero_bits,
        codes=p.codes.to(torch.uint8),
        scale_codes=None if second is None else scales.to(torch.uint8),
        zero_codes=None if second is None else zeros.to(torch.uint8),
        second_order=second,
        scales=scales if second is None else None,
        zeros=zeros if second is None else None,
        unit=torch.tensor([unit], dtype=torch.float32),
        row_offsets=offsets,
        outlier_columns=columns.int(),
        outlier_values=_fp16("outliers", missing),
        perm=None if p.perm is None else p.perm.int(),
    )
    return SpQRWeight.pack(codes)


def _check_permutation(what: str, perm: Tensor, k: int) -> Tensor | None:
    """perm as int64; None for the identity."""
    ids = perm.long()
    identity = torch.arange(k)
    if perm.dim() != 1 or not torch.equal(ids.sort().values, identity):
        raise ValueError(f"{what} of shape {list(perm.shape)} is not a permutation of 0 ... {k - 1}")
    return None if torch.equal(ids, identity) else ids


def _check_codes(what: str, codes: Tensor, bits: int) -> None:
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        least, most = int(codes.min()), int(codes.max())
        raise ValueError(f"{what} must be codes of {bits} bits, got values from {least} to {most}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")


def import_legacy_layer(layer: Mapping[str, Any], bits: int = 3, scale_bits: int = 3, zero_bits: int = 3) -> SpQRWeight:
    """A layer that ``main.py --save`` wrote: one file of its directory, as ``torch.load(..., weights_only=True)`` gives
    it.

    Args:
        layer: ``quant_weights`` int8 [n, k], columns permuted; ``quant_layer_scale`` and ``quant_layer_zeros``: for
            each group of columns int8 [n / beta2, beta2], and the four ``quant_layer_..._qq_...`` [n / beta2, 1], fp16,
            bf16 or fp32; or, with those four empty, the scales and zero points themselves, [n] or [n, 1];
            ``outliers_matrix`` sparse [n, k], whole values, 0 where there is none; ``perm`` [k] or None; ``groupsize``.
        bits, scale_bits, zero_bits: ``wbits``, ``qq_scale_bits`` and ``qq_zero_bits`` of the directory's ``args.pt``.

    Raises:
        ValueError: something is missing, has another dtype or shape, or values that cannot be; groups other than 16, 32
            or 64 columns, bits that octavo does not have.

    Example:
        >>> from octavo.integrations.spqr import import_legacy_layer
        >>> import_legacy_layer({})
        Traceback (most recent call last):
        ValueError: quant_weights must be int8 [out_features, in_features], got a NoneType
    """
    codes = layer.get("quant_weights")
    if not isinstance(codes, Tensor) or codes.dtype is not torch.int8 or codes.dim() != 2:
        raise ValueError(f"quant_weights must be int8 [out_features, in_features], got {_describe(codes)}")
    n, k = codes.shape
    stored = layer.get("weight_shape", (n, k))
    if tuple(stored) != (n, k):
        raise ValueError(f"weight_shape is {list(stored)}, quant_weights is {_describe(codes)}")
    if kept := layer.get("keep_last_columns", 0):
        raise ValueError(f"keep_last_columns is {kept}: unquantized columns cannot be imported")
    group_size = layer.get("groupsize")
    if group_size not in (16, 32, 64) or k % group_size:
        raise ValueError(f"groupsize must be 16, 32 or 64 and divide in_features {k}, got {group_size}")
    _check_bits(bits, scale_bits, zero_bits)
    _check_codes("quant_weights", codes, bits)

    lists: dict[str, Any] = {name: layer.get(name) for name in (*_LEGACY, *_SECOND)}
    empty = [name for name in _SECOND if not lists[name]]
    if empty and len(empty) < len(_SECOND):
        raise ValueError(f"{', '.join(empty)} empty beside the others: only scales or only zero points are quantized")
    groups = k // group_size
    for name in _LEGACY if empty else lists:
        value = lists[name]
        if not isinstance(value, (list, tuple)) or len(value) != groups:
            raise ValueError(f"{name} must be a list of {groups} tensors, one a group, got {_describe(value)}")
    stats_group_size, second = 16, None
    if empty:
        scales, zeros = (_columns(name, lists[name], (n,), False) for name in _LEGACY)
    else:
        first = lists[_LEGACY[0]][0]
        stats_group_size = first.shape[1] if isinstance(first, Tensor) and first.dim() == 2 else 0
        if stats_group_size < 16 or stats_group_size % 16 or n % stats_group_size:
            raise ValueError(
                f"quant_layer_scale must hold int8 [out_features / beta2, beta2], beta2 a multiple of 16, "
                f"out_features {n}; got {_describe(first)}"
            )
        scales, zeros = (
            _columns(name, lists[name], (n // stats_group_size, stats_group_size), True) for name in _LEGACY
        )
        for name, values, width in zip(_LEGACY, (scales, zeros), (scale_bits, zero_bits), strict=True):
            _check_codes(name, values, width)
        # their names: of scale and zero each the scale and the zero point, which is also our order
        parts = [_columns(name, lists[name], (n // stats_group_size,), False) for name in _SECOND]
        second = torch.stack(parts, -1)

    outliers = layer.get("outliers_matrix")
    if not isinstance(outliers, Tensor) or outliers.layout is torch.strided or tuple(outliers.shape) != (n, k):
        raise ValueError(f"outliers_matrix must be a sparse tensor [{n}, {k}], got {_describe(outliers)}")
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        outliers = outliers.detach().cpu().to_sparse().coalesce()
    indices, values = outliers.indices(), outliers.values().float()
    there = values != 0  # 0 is no outlier: what the code gives stands
    perm = layer.get("perm")
    return _pack(
        _Parts(
            bits, group_size, stats_group_size, scale_bits, zero_bits,
            codes=codes.cpu(),
            scales=scales,
            zeros=zeros,
            second_order=second,
            rows=indices[0, there],
            columns=indices[1, there],
            values=values[there],
            perm=None if perm is None else _check_permutation("perm", perm.cpu(), k),
        )
    )  # fmt: skip


def _check_bits(bits: int, scale_bits: int, zero_bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ValueError(f"octavo has SpQR weights of 2, 3 and 4 bits, got {bits}")
    for name, value in (("scales", scale_bits), ("zero points", zero_bits)):
        if not 1 <= value <= 4:
            raise ValueError(f"octavo has codes of {name} of 1 to 4 bits, got {value}")


def _columns(name: str, tensors: Sequence[Any], shape: tuple[int, ...], codes: bool) -> Tensor:
    """One tensor for each group, as one fp32 tensor with a column for each."""
    dtypes = (torch.int8,) if codes else (torch.float16, torch.bfloat16, torch.float32)
    for group, t in enumerate(tensors):
        fits = isinstance(t, Tensor) and t.dtype in dtypes and (codes or tuple(t.shape) in (shape, (*shape, 1)))
        if not fits or (codes and tuple(t.shape) != shape):
            kind = "int8" if codes else "float16, bfloat16 or float32"
            raise ValueError(f"{name}[{group}] must be {kind} {list(shape)}, got {_describe(t)}")
    return torch.stack([t.detach().cpu().float().flatten() for t in tensors], 1)


def import_compressed_layer(
    tensors: Mapping[str, Tensor], out_features: int | None = None, in_features: int | None = None
) -> SpQRWeight:
    """A layer as the authors' kernel reads it (their ``QuantizedLinear``): 3 bits, 16 x 16, statistics of 3 bits.

    Args:
        tensors: ``dense_weights`` int64, one word for 16 weights of a row: from bit 0, the scale's code (3 bits), the
            zero point's (3), 16 codes (3 each), 8 of the 64 bits of the tile's second order, each given in two rows;
            ``row_offsets`` int32, of rows (CSR) or of tiles of 16 rows, whose entries alternate between the rows and
            are padded with zeros (PTCSR); ``col_vals`` int32: column in the low half, fp16 value in the high one;
            ``in_perm`` int32, two 16-bit ids a word, absent or empty for the identity.
        out_features, in_features: the shape, which the tensors do not always give: without ``in_perm`` it can be that
            two shapes fit.

    Raises:
        ValueError: something is missing, has another dtype or shape, does not fit together, two copies of the second
            order differ, outliers outside of the weight, two at one place, or NaN: files that were converted by the
            authors' program have lost the values of outliers in columns from 32768 on.

    Example:
        >>> from octavo.integrations.spqr import import_compressed_layer
        >>> import_compressed_layer({})
        Traceback (most recent call last):
        ValueError: dense_weights must be int64 with one dimension, got a NoneType
    """
    for name, dtype in (("dense_weights", torch.int64), ("row_offsets", torch.int32)):
        if not isinstance(t := tensors.get(name), Tensor) or t.dtype is not dtype or t.dim() != 1:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be {kind} with one dimension, got {_describe(t)}")
    entries, pairs = tensors.get("col_vals"), tensors.get("in_perm")
    for name, t in (("col_vals", entries), ("in_perm", pairs)):  # without elements they come in any dtype
        if t is not None and t.numel() and (t.dtype is not torch.int32 or t.dim() != 1):
            raise ValueError(f"{name} must be int32 with one dimension, got {_describe(t)}")
    entries = torch.zeros(0, dtype=torch.int64) if entries is None else entries.detach().cpu().long()
    pairs = None if pairs is None or not pairs.numel() else pairs.detach().cpu().long()
    words, offsets = (tensors[name].detach().cpu().long() for name in ("dense_weights", "row_offsets"))
    n, k = _compressed_shape(len(words), offsets, pairs, out_features, in_features)

    if bool((words >> 62 != 0).any()):
        raise ValueError(f"dense_weights: bits 62 and 63 of word {int((words >> 62 != 0).nonzero()[0])} are not 0")
    words = words.view(n // _TILE, k // _TILE, _TILE)
    codes = torch.stack([(words >> (6 + 3 * lane) & 7).to(torch.uint8) for lane in range(_TILE)], -1)
    scales, zeros = ((words >> shift & 7).permute(0, 2, 1).reshape(n, -1) for shift in (0, 3))
    fragments = (words >> 54 & 0xFF).to(torch.uint8)
    if not torch.equal(fragments[..., 0::2], fragments[..., 1::2]):
        tile = (fragments[..., 0::2] != fragments[..., 1::2]).any(-1).nonzero()[0].tolist()
        raise ValueError(f"dense_weights: the two copies of the second order in tile {tile} differ")
    record = fragments[..., 0::2].contiguous().view(torch.float16)  # ss, sz, zs, zz, little-endian as torch's machines
    rows, columns, values = _compressed_outliers(entries, offsets, n, k)
    perm = None if pairs is None else torch.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), 1).flatten()
    return _pack(
        _Parts(
            3, _TILE, _TILE, 3, 3,
            codes=codes.permute(0, 2, 1, 3).reshape(n, k),
            scales=scales,
            zeros=zeros,
            second_order=record[..., [0, 2, 1, 3]].float(),
            rows=rows,
            columns=columns,
            values=values,
            perm=None if perm is None else _check_permutation("in_perm", perm, k),
        )
    )  # fmt: skip


def _compressed_shape(
    words: int, offsets: Tensor, pairs: Tensor | None, n: int | None, k: int | None
) -> tuple[int, int]:
    """The one shape that fits what is there."""
    for name, size in (("out_features", n), ("in_features", k)):
        if size is not None and (size <= 0 or size % _TILE):
            raise ValueError(f"the compressed format is for multiples of {_TILE}, got {name} {size}")
    length, tiles = len(offsets) - 1, words // _TILE
    by_tiles = length * _TILE if not bool((offsets % _TILE).any()) else 0
    fitting = []
    for rows in dict.fromkeys((length, by_tiles)):
        if rows <= 0 or rows % _TILE or words % _TILE or tiles % (rows // _TILE):
            continue
        columns = tiles // (rows // _TILE) * _TILE
        known = (n, k, None if pairs is None else 2 * len(pairs))
        if all(size in (None, found) for size, found in zip(known, (rows, columns, columns), strict=True)):
            fitting.append((rows, columns))
    have = f"{words} dense_weights, {len(offsets)} row_offsets"
    have += ", no in_perm" if pairs is None else f", {len(pairs)} in_perm"
    if not fitting:
        wanted = "" if n is None and k is None else f" [{n or '?'}, {k or '?'}]"
        raise ValueError(f"no weight{wanted} of multiples of {_TILE} has {have}: the tensors do not fit together")
    if len(fitting) > 1:
        shapes = " and ".join(str(list(shape)) for shape in fitting)
        raise ValueError(f"{have}: that fits {shapes}; give out_features and in_features")
    if fitting[0][1] > 65536:
        raise ValueError(f"in_features {fitting[0][1]}: the compressed format has 16-bit columns")
    return fitting[0]


def _compressed_outliers(entries: Tensor, offsets: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and whole values; padding and zeros, which are no outliers, are left out."""
    falls = bool((offsets.diff() < 0).any())
    if int(offsets[0]) != 0 or falls or int(offsets[-1]) != len(entries):
        ends = f"from {int(offsets[0])} to {int(offsets[-1])}" + (", falling in between" if falls else "")
        raise ValueError(f"row_offsets must ascend from 0 to {len(entries)} (col_vals), got {ends}")
    place = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    by_tile = len(offsets) != n + 1
    rows = place * _TILE + torch.arange(len(entries)) % _TILE if by_tile else place
    columns, bits = entries & 0xFFFF, entries >> 16 & 0xFFFF  # no sign: ids go to 65535
    values = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.float16).float()
    there = values != 0
    rows, columns, values = rows[there], columns[there], values[there]
    if bad := int((~values.isfinite()).sum()):
        least = int(columns[~values.isfinite()].min())
        hint = " (their converter spoils outliers in columns from 32768 on; import what main.py --save wrote)"
        raise ValueError(
            f"{bad} of {len(values)} outliers are NaN or Inf, from column {least}{hint * (least >= 32768)}"
        )
    if bool((columns >= k).any()):
        at = int((columns >= k).nonzero()[0])
        raise ValueError(f"an outlier of row {int(rows[at])} has column {int(columns[at])}, in_features is {k}")
    places, counts = torch.unique(rows * k + columns, return_counts=True)
    if bool((counts > 1).any()):
        at = int(places[counts > 1][0])
        raise ValueError(f"two outliers at row {at // k}, column {at % k}")
    return rows, columns, values
