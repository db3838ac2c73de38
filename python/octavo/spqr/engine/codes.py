"""`SpQRCodes`: what the quantizer computes of one weight, before it is packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpQRCodes:
    """A quantized weight [n, k] as plain tensors; `dequantize` says what they mean.

    Attributes:
        n, k, bits, group_size, stats_group_size, scale_bits, zero_bits: as in `SpQRConfig`.
        codes: uint8 [n, k]; columns here and below are in the quantizer's order.
        unit: fp32 [1], a power of two: the weight is ``unit`` times what all others make.
        row_offsets: int32 [n + 1], where the outliers of each row begin.
        outlier_columns: int32 [count], ascending in each row.
        outlier_values: fp16 [count], what each outlier adds to the dense value.
        perm: int32 [k]: column j here is column perm[j] of the weight; None: they are the same.
        scales, zeros: fp16 [n, groups], without a second level.
        scale_codes, zero_codes: uint8 [n, groups] with one.
        second_order: fp16 [ceil(n / stats_group_size), groups, 4]: scale and zero of the scales, of the zeros.
        tau, damping: with which it was quantized.
        loss: sum of the squared errors over the inverse Hessian's diagonal, what the quantizer minimizes; in units of
            that of the weight's variance, the threshold's unit.
        error: relative error of the layer's output on the calibration inputs; NaN without a Hessian.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> codes = quantize_weight(torch.arange(16.0).repeat(16, 2), None, settings)
        >>> codes.n, codes.k, codes.bits, codes.codes.shape
        (16, 32, 4, torch.Size([16, 32]))
    """

    n: int
    k: int
    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int
    codes: Tensor
    unit: Tensor
    row_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    perm: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    scale_codes: Tensor | None = None
    zero_codes: Tensor | None = None
    second_order: Tensor | None = None
    tau: float = math.inf
    damping: float = 0.0
    loss: float = math.nan
    error: float = math.nan

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The fp32 scales and zero points [n, groups] that codes are read with."""
        if self.second_order is None:
            assert self.scales is not None and self.zeros is not None
            return self.scales.float(), self.zeros.float()
        assert self.scale_codes is not None and self.zero_codes is not None
        record = self.second_order.float().repeat_interleave(self.stats_group_size, 0)[: self.n]
        scales = (self.scale_codes.float() - record[..., 1]) * record[..., 0]
        return scales, (self.zero_codes.float() - record[..., 3]) * record[..., 2]

    def dequantize(self) -> Tensor:
        """fp32 [n, k] in the weight's own order: ``unit * (scale * (code - zero) + outlier)``."""
        scales, zeros = (s.repeat_interleave(self.group_size, 1) for s in self.statistics())
        weight = scales * (self.codes.float() - zeros)
        rows = torch.repeat_interleave(torch.arange(self.n), self.row_offsets.long().diff().cpu()).to(weight.device)
        weight[rows, self.outlier_columns.long()] += self.outlier_values.float()
        weight *= self.unit
        if self.perm is None:
            return weight
        out = torch.empty_like(weight)
        out[:, self.perm.long()] = weight
        return out

    @property
    def outlier_share(self) -> float:
        """The outliers' share of all weights."""
        return len(self.outlier_values) / max(1, self.n * self.k)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula: codes, statistics, 32 for each outlier; no padding, no offsets.

        ``bits + (scale_bits + zero_bits) / beta1 + 64 / (beta1 * beta2) + 32 * share``; without a second level
        ``bits + 32 / beta1 + 32 * share``.
        """
        bits = self.bits + 32 * self.outlier_share
        if self.second_order is None:
            return bits + 32 / self.group_size
        second = 64 / (self.group_size * self.stats_group_size)
        return bits + (self.scale_bits + self.zero_bits) / self.group_size + second
