"""`spqr_quantize_columns` in plain PyTorch: column by column, and leave-one-out by refitting a group once per weight.

Given the same arguments, the compiled one gives the same bits. Everything is fp32, one rounding per operation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FAR = {False: 16.0, True: 1.0}  # a group farther from 0 than so many of its ranges is fitted with 0; two levels: 1
_MIN_SCALE = 2.0**-100


def _inverse(scale: Tensor) -> Tensor:
    usable = scale >= _MIN_SCALE
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def _fit(low: Tensor, high: Tensor, most: float, far: float) -> tuple[Tensor, Tensor]:
    """scale = (high - low) / most, zero = -low / scale; see csrc/spqr/columns_loops.h for ranges far from 0."""
    wide = torch.maximum(low, -high) > far * (high - low)
    low, high = torch.where(wide, low.clamp_max(0.0), low), torch.where(wide, high.clamp_min(0.0), high)
    scale = (high - low) / most
    return scale, -low * _inverse(scale)


def _code(w: Tensor, scale: Tensor, zero: Tensor, most: float) -> Tensor:
    return (w * _inverse(scale) + zero).round().clamp(0.0, most)


def _losses(group: Tensor, diagonal: Tensor, low: Tensor, high: Tensor, most: float, far: float) -> Tensor:
    scale, zero = _fit(low, high, most, far)
    value = scale[:, None] * (_code(group, scale[:, None], zero[:, None], most) - zero[:, None])
    return ((group - value) / diagonal).square()


def _likely_outliers(group: Tensor, diagonal: Tensor, threshold: float, most: float, far: float) -> Tensor:
    """Which weights, left out of their group, lower its loss by more than the threshold."""
    now = _losses(group, diagonal, group.amin(1), group.amax(1), most, far)
    gains = torch.empty_like(group)
    for left_out in range(group.shape[1]):
        others = torch.cat((group[:, :left_out], group[:, left_out + 1 :]), 1)
        then = _losses(group, diagonal, others.amin(1), others.amax(1), most, far)
        gain = torch.zeros_like(group[:, 0])
        for column in range(group.shape[1]):
            gain = gain + (now[:, column] if column == left_out else now[:, column] - then[:, column])
        gains[:, left_out] = gain
    return gains > threshold


def _fit_group(
    group: Tensor, diagonal: Tensor, threshold: float, leave_one_out: bool, most: float, far: float
) -> tuple[Tensor, Tensor]:
    low, high = group.amin(1), group.amax(1)
    if leave_one_out and threshold < math.inf:
        likely = _likely_outliers(group, diagonal, threshold, most, far)
        none = likely.all(1)
        low = torch.where(none, low, group.masked_fill(likely, math.inf).amin(1))
        high = torch.where(none, high, group.masked_fill(likely, -math.inf).amax(1))
    return _fit(low, high, most, far)


def _second_level(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero, and what they decode to, of the statistics x that share one scale and zero."""
    most = float((1 << bits) - 1)
    low, high = x.amin(), x.amax()
    magnitude = torch.maximum(-low, high)
    scale = ((high - low) / most).half()
    step = scale.float()
    if not (high - low >= magnitude * 2.0**-10 and step > 0 and magnitude <= step * 32768.0):
        scale, zero = (low + 0.5 * (high - low)).half(), torch.zeros((), dtype=torch.float16)
        code = torch.ones_like(x)
    else:
        zero = (-low / step).half()
        code = (x * (1.0 / step) + zero.float()).round().clamp(0.0, most)
    return code.to(torch.uint8), scale, zero, (code - zero.float()) * scale.float()


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
    n, k = weight.shape
    most, w = float((1 << bits) - 1), weight.clone()
    threshold = float(torch.tensor(threshold, dtype=torch.float32))
    groups, tiles = k // group_size, -(-n // stats_group_size)
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=torch.uint8 if scale_bits else torch.float16)
    zeros = torch.empty_like(scales)
    second_order = torch.empty(tiles if scale_bits else 0, groups, 4, dtype=torch.float16)
    residual, error = torch.zeros(n, k, dtype=torch.float16), torch.empty(n, k)
    diagonal = factor.diagonal()
    for column in range(k):
        group, within = divmod(column, group_size)
        if within == 0:
            columns = slice(column, column + group_size)
            scale, zero = _fit_group(
                w[:, columns], diagonal[columns], threshold, leave_one_out, most, _FAR[scale_bits > 0]
            )
            if scale_bits:
                for tile in range(tiles):
                    rows = slice(tile * stats_group_size, (tile + 1) * stats_group_size)
                    scales[rows, group], s_scale, s_zero, scale[rows] = _second_level(scale[rows], scale_bits)
                    zeros[rows, group], z_scale, z_zero, zero[rows] = _second_level(zero[rows], zero_bits)
                    second_order[tile, group] = torch.stack((s_scale, s_zero, z_scale, z_zero))
            else:
                scales[:, group], zeros[:, group] = scale.half(), zero.half()
                scale, zero = scale.half().float(), zero.half().float()
        code = _code(w[:, column], scale, zero, most)
        value = scale * (code - zero)
        e = (w[:, column] - value) / diagonal[column]
        is_outlier = e.square() > threshold
        residual[:, column] = torch.where(is_outlier, w[:, column] - value, 0.0).half()
        value = torch.where(is_outlier, value + residual[:, column].float(), value)
        e = (w[:, column] - value) / diagonal[column]
        codes[:, column], error[:, column] = code.to(torch.uint8), e
        for later in range(column + 1, k):
            w[:, later] = w[:, later] - e * factor[column, later]
    return codes, scales, zeros, second_order, residual, error
