"""Making, undoing and checking sparse matrices in compressed rows, for `octavo.csr_matmul`."""

from __future__ import annotations

import torch
from torch import Tensor

_NARROW_COLUMNS = 1 << 16  # the k that uint16 column numbers reach


def dense_to_csr(
    dense: Tensor, threshold: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a matrix that a threshold or a mask picks, in compressed rows.

    How many there are depends on the data: on a GPU this waits for the device, once, and it cannot be captured in a
    CUDA graph.

    Args:
        dense: [n, k], fp32, fp16 or bf16.
        threshold: picks ``|dense| >= threshold``; NaN, which is not comparable, is picked, too.
        mask: bool [n, k], picks where it is true, zeros included. With neither: what is not 0.

    Returns:
        values [nnz] in dense's dtype; columns [nnz], ascending in each row, uint16 for k up to 65536, else int32;
        row_offsets [n + 1], int32, or int64 for 2**31 entries and more.

    Raises:
        ValueError: not a matrix, threshold and mask together, a negative or NaN threshold, a mask of another shape or
            dtype, k of 2**31 or more.
        TypeError: a dtype that is none of the three.

    Example:
        >>> import octavo, torch
        >>> octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 0.5]]), threshold=1.0)
        (tensor([2., 3.]), tensor([1, 0], dtype=torch.uint16), tensor([0, 1, 2], dtype=torch.int32))
    """
    if dense.dim() != 2:
        raise ValueError(f"dense_to_csr: dense must be a matrix, got shape {list(dense.shape)}")
    if dense.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dense_to_csr: dense must be float32, float16 or bfloat16, got {dense.dtype}")
    if threshold is not None and mask is not None:
        raise ValueError("dense_to_csr: threshold and mask exclude each other")
    if dense.shape[1] >= 1 << 31:
        raise ValueError(f"dense_to_csr: dense must have fewer than 2**31 columns, got {dense.shape[1]}")
    if mask is not None:
        if mask.shape != dense.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"dense_to_csr: mask must be bool of shape {list(dense.shape)}, got {mask.dtype} {list(mask.shape)}"
            )
        picked = mask
    elif threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"dense_to_csr: threshold must be 0 or positive, got {threshold}")
        picked = ~(dense.abs() < threshold)
    else:
        picked = dense != 0
    rows, columns = picked.nonzero(as_tuple=True)
    offset_dtype = torch.int32 if len(rows) < 1 << 31 else torch.int64
    offsets = torch.zeros(dense.shape[0] + 1, dtype=torch.int64, device=dense.device)
    torch.cumsum(picked.sum(1), 0, out=offsets[1:])
    columns = columns.to(torch.int32)
    if dense.shape[1] <= _NARROW_COLUMNS:
        columns = columns.to(torch.uint16)
    return dense[picked], columns, offsets.to(offset_dtype)


def _entry_rows(row_offsets: Tensor, count: int) -> Tensor:
    """The row of each entry, without waiting for the device."""
    offsets = row_offsets.long()
    entries = torch.arange(count, device=offsets.device)
    return torch.searchsorted(offsets, entries, right=True) - 1


def csr_to_dense(values: Tensor, columns: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    """The matrix [n, k], in values' dtype; entries with equal columns are added in fp32. Differentiable in values.

    Deterministic. A composition of PyTorch's operators: nothing of the sparse form is checked but what they check;
    see `validate_csr`.

    Args:
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32 or uint16.
        row_offsets: [n + 1], int32 or int64.
        k: the number of columns.

    Example:
        >>> import octavo, torch
        >>> dense = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
        >>> torch.equal(octavo.sparse.csr_to_dense(*octavo.sparse.dense_to_csr(dense), k=2), dense)
        True
    """
    n = len(row_offsets) - 1
    places = _entry_rows(row_offsets, len(columns)) * k + columns.to(torch.int32)
    flat = torch.zeros(n * k, dtype=torch.float32, device=values.device)
    if values.device.type == "cpu":
        flat = flat.index_add(0, places, values.float())  # one after the other
    else:
        flat = flat.index_put((places,), values.float(), accumulate=True)  # sorts
    return flat.view(n, k).to(values.dtype)


def validate_csr(values: Tensor, columns: Tensor, row_offsets: Tensor, k: int) -> None:
    """Check all that makes a sparse matrix [n, k] in compressed rows; on a GPU this waits for the device.

    Args:
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32 or uint16: in [0, k), ascending in each row. Equal ones may follow each other.
        row_offsets: [n + 1], int32 or int64: from 0, never decreasing, to nnz.
        k: the number of columns.

    Raises:
        ValueError: names the first row or entry that is wrong, and its values.
        TypeError: a wrong dtype.

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> octavo.sparse.validate_csr(values, columns, row_offsets, k=1)
        Traceback (most recent call last):
        ValueError: validate_csr: columns must be in [0, 1), got 1 in row 0 (entry 0)
    """
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"validate_csr: values must be float32, float16 or bfloat16, got {values.dtype}")
    if columns.dtype not in (torch.int32, torch.uint16):
        raise TypeError(f"validate_csr: columns must be int32 or uint16, got {columns.dtype}")
    if row_offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"validate_csr: row_offsets must be int32 or int64, got {row_offsets.dtype}")
    shapes = [list(t.shape) for t in (values, columns, row_offsets)]
    if any(len(shape) != 1 for shape in shapes) or shapes[0] != shapes[1] or shapes[2] == [0]:
        raise ValueError(f"validate_csr: need shapes [nnz], [nnz] and [n + 1], got {shapes}")
    devices = sorted({str(t.device) for t in (values, columns, row_offsets)})
    if len(devices) > 1:
        raise ValueError(f"validate_csr: all tensors must be on one device, got {' and '.join(devices)}")
    offsets, column, nnz = row_offsets.long(), columns.to(torch.int32), len(columns)
    if int(offsets[0]) != 0:
        raise ValueError(f"validate_csr: row_offsets must begin with 0, got {int(offsets[0])}")
    falling = (offsets.diff() < 0).nonzero()
    if len(falling) > 0:
        row = int(falling[0])
        raise ValueError(
            f"validate_csr: row_offsets must not decrease, got {offsets[row : row + 2].tolist()} for row {row}"
        )
    if int(offsets[-1]) != nnz:
        raise ValueError(
            f"validate_csr: row_offsets must end with the number of entries, {nnz}, got {int(offsets[-1])}"
        )
    rows = _entry_rows(offsets, nnz)
    outside = ((column < 0) | (column >= k)).nonzero()
    if len(outside) > 0:
        entry = int(outside[0])
        raise ValueError(
            f"validate_csr: columns must be in [0, {k}), got {int(column[entry])} in row {int(rows[entry])} "
            f"(entry {entry})"
        )
    unsorted = ((column.diff() < 0) & (rows.diff() == 0)).nonzero()
    if len(unsorted) > 0:
        entry = int(unsorted[0])
        raise ValueError(
            f"validate_csr: columns must ascend within a row, got {column[entry : entry + 2].tolist()} in row "
            f"{int(rows[entry])} (entries {entry}, {entry + 1})"
        )
