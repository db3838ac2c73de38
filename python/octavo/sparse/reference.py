"""Products with a sparse matrix in plain PyTorch: see :mod:`octavo.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.gradients import as_rows


def _csr_rows(row_offsets: Tensor) -> Tensor:
    """The row of each entry."""
    offsets = row_offsets.long()
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())


def _csr_dense(values: Tensor, columns: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    dense = torch.zeros(len(row_offsets) - 1, k, dtype=torch.float64, device=values.device)
    column = columns.to(torch.int32).long()
    keep = (column >= 0) & (column < k)
    return dense.index_put((_csr_rows(row_offsets)[keep], column[keep]), values.double()[keep], accumulate=True)


def csr_matmul(
    values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None = None
) -> Tensor:
    out = x.double() @ _csr_dense(values, columns, row_offsets, x.shape[-1]).T
    return out if bias is None else out + bias.double()


def csr_matmul_add(out: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor) -> None:
    out.copy_(out.double() + csr_matmul(values, columns, row_offsets, x, len(row_offsets) - 1))


def csr_matmul_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, g: Tensor, k: int) -> Tensor:
    return g.double() @ _csr_dense(values, columns, row_offsets, k)


def csr_grad_values(
    columns: Tensor, row_offsets: Tensor, g: Tensor, x: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    whole = as_rows(g.double()).T @ as_rows(x.double())
    column, k = columns.to(torch.int32).long(), x.shape[-1]
    exists = (column >= 0) & (column < k)
    entries = torch.zeros(len(column), dtype=torch.float64, device=x.device)
    entries[exists] = whole[_csr_rows(row_offsets)[exists], column[exists]]
    return entries.to(dtype)
