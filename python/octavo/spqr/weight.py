"""`SpQRWeight`: the tensors of one SpQR weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops, packing

if TYPE_CHECKING:
    from .engine.codes import SpQRCodes

TENSORS = ("codes", "statistics", "second_order", "unit", "outliers", "row_offsets", "perm")


@dataclass(frozen=True, eq=False)
class SpQRWeight:
    """A weight [n, k] in 2 to 4 bits as `octavo.spqr_matmul` reads it (arXiv 2306.03078).

    ``W[i, perm[j]] = unit * (s[i, g] * (code[i, j] - z[i, g]) + outlier[i, j])`` with ``g = j // group_size``; the
    layout of each tensor is in csrc/spqr/README.md. Made by `octavo.spqr.quantize_weight`, by the importers, or by
    `pack` from codes. It holds the tensors that it is given: no copies.

    Attributes:
        n, k: output and input features.
        bits: of a code: 2, 3 or 4.
        group_size: columns that share a scale and a zero point: 16, 32 or 64 (the paper's beta1).
        stats_group_size: rows whose scales, and zero points, are quantized together (beta2): a multiple of 16.
        scale_bits, zero_bits: of the codes of scales and zero points, 1 to 4; unused where second_order is None.
        codes, statistics, second_order, unit, outliers, row_offsets, perm: see `octavo.ops.spqr_linear`.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> w = SpQRWeight.pack(quantize_weight(torch.ones(16, 32), None, settings))
        >>> w.dequantize(torch.float32).shape
        torch.Size([16, 32])
    """

    n: int
    k: int
    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int
    codes: Tensor
    statistics: Tensor
    second_order: Tensor | None
    unit: Tensor
    outliers: Tensor
    row_offsets: Tensor
    perm: Tensor | None

    @classmethod
    def pack(cls, c: SpQRCodes) -> SpQRWeight:
        """The packed form of what the quantizer computed, on the same device."""
        if c.second_order is None:
            assert c.scales is not None and c.zeros is not None
            statistics = packing.pack_plain(c.scales, c.zeros)
        else:
            assert c.scale_codes is not None and c.zero_codes is not None
            statistics = packing.pack_fields(c.scale_codes, c.zero_codes, c.scale_bits, c.zero_bits)
        return cls(
            c.n,
            c.k,
            c.bits,
            c.group_size,
            c.stats_group_size,
            c.scale_bits,
            c.zero_bits,
            codes=packing.pack_codes(c.codes, c.bits),
            statistics=statistics,
            second_order=c.second_order,
            unit=c.unit,
            outliers=packing.pack_outliers(c.outlier_columns, c.outlier_values, c.k),
            row_offsets=c.row_offsets,
            perm=None if c.perm is None else packing.pack_perm(c.perm),
        )

    def arguments(self) -> tuple[Any, ...]:
        """The tensors in the order in which the operators take them."""
        return tuple(getattr(self, name) for name in TENSORS)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k] that `octavo.spqr_matmul` multiplies by, rounded once to `dtype`."""
        sizes = (self.group_size, self.stats_group_size, self.scale_bits, self.zero_bits)
        arguments = (*self.arguments(), self.n, self.k, dtype, *sizes)
        return ops.spqr_dequantize(*arguments)

    def map(self, function: Callable[[Tensor], Tensor]) -> SpQRWeight:
        """The same weight with `function` applied to each tensor, for moves between devices."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in TENSORS}
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

    def to(self, device: torch.device | str) -> SpQRWeight:
        return self.map(lambda tensor: tensor.to(device))

    @property
    def outlier_count(self) -> int:
        return self.outliers.shape[0]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors, which the weight takes in memory and, but for headers, on disk."""
        return sum(t.numel() * t.element_size() for t in self.arguments() if t is not None)

    @property
    def real_bits(self) -> float:
        """Bits stored per weight: everything counted, padding, row offsets and permutation too."""
        return 8 * self.bytes / max(1, self.n * self.k)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula (section 5): codes, statistics, 32 for each outlier.

        ``bits + (scale_bits + zero_bits) / beta1 + 64 / (beta1 * beta2) + 32 * outliers / (n * k)``; without bilevel
        quantization ``bits + 32 / beta1 + ...``.
        """
        bits = self.bits + 32 * self.outlier_count / max(1, self.n * self.k)
        if self.second_order is None:
            return bits + 32 / self.group_size
        second = 64 / (self.group_size * self.stats_group_size)
        return bits + (self.scale_bits + self.zero_bits) / self.group_size + second

    def validate(self) -> list[str]:
        """List the errors among the values that kernels trust, one line each: empty for a sound weight.

        Shapes and dtypes are checked by the operators on each call; this reads the tensors and waits for the device.
        """
        errors = []
        offsets = self.row_offsets.long()
        if len(offsets) != self.n + 1:
            return [f"row_offsets must have n + 1 = {self.n + 1} elements, got {len(offsets)}"]
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.outlier_count:
            ends = f"got {int(offsets[0])} and {int(offsets[-1])}"
            errors.append(f"row_offsets must begin with 0 and end with {self.outlier_count} (outliers), {ends}")
        if bool((falls := offsets[1:] < offsets[:-1]).any()):
            row = int(falls.nonzero()[0])
            errors.append(f"row_offsets decrease at row {row}: {int(offsets[row])}, then {int(offsets[row + 1])}")
        if not errors and self.outlier_count:
            columns, values = packing.unpack_outliers(self.outliers)
            rows = torch.repeat_interleave(torch.arange(self.n, device=offsets.device), offsets.diff())
            outside = (columns < 0) | (columns >= self.k)
            unsorted = (rows[1:] == rows[:-1]) & (columns[1:] <= columns[:-1])
            if bool(outside.any()):
                at = int(outside.nonzero()[0])
                errors.append(f"outlier {at} (row {int(rows[at])}) has column {int(columns[at])}, k is {self.k}")
            elif bool(unsorted.any()):
                at = int(unsorted.nonzero()[0])
                pair = f"{int(columns[at])}, then {int(columns[at + 1])}"
                errors.append(f"outlier columns of row {int(rows[at])} do not ascend: {pair}")
            if bad := int((~values.isfinite()).sum()):
                errors.append(f"{bad} of {len(values)} outlier values are NaN or Inf")
        if self.perm is not None:
            ids = packing.unpack_perm(self.perm, self.k)
            if not torch.equal(ids.sort().values, torch.arange(self.k, device=ids.device)):
                errors.append(f"perm is not a permutation of 0 ... {self.k - 1}")
        statistics = self.statistics if self.second_order is None else self.second_order
        if bad := int((~statistics.isfinite()).sum()):
            errors.append(f"{bad} of {statistics.numel()} scales and zero points are NaN or Inf")
        if self.unit.numel() != 1 or not float(self.unit) > 0 or not bool(self.unit.isfinite().all()):
            errors.append(f"unit must be one positive number, got {self.unit.tolist()}")
        return errors
