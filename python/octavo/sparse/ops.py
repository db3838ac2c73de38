"""The operators on sparse matrices in compressed rows: see :mod:`octavo.ops`, which exports them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.fakes import fake

# S[n, k] is (values [nnz], columns [nnz], row_offsets [n + 1]): entry e of row i, row_offsets[i] <= e <
# row_offsets[i + 1], is values[e] at columns[e]. Columns ascend within a row (equal ones add up).


def csr_matmul(
    values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None = None
) -> Tensor:
    """``x @ S.T + bias`` for a sparse S, accumulated in fp32 and rounded once.

    ``y[..., i] = sum_e values[e] * x[..., columns[e]] + bias[i]`` over the entries e of row i: the outliers of SpQR
    (arXiv 2306.03078, section 4), outlier columns, sparse differences of weights. What is not stored does not exist:
    a NaN or Inf of x reaches only rows with an entry in its column. Work is divided by entries, so one full row among
    empty ones does not wait for itself. Deterministic: the same bits whatever the number of threads. Nothing waits
    for the host.

    `octavo.csr_matmul` is this operator, differentiable in x, values and bias.

    On the CPU, row_offsets that do not begin with 0, decrease, or do not end with nnz are errors. Columns outside
    [0, k) are found by `validate_csr` only: here such an entry adds nothing, and nothing outside the tensors is read.

    Args:
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32, or uint16 for k up to 65536.
        row_offsets: [n + 1], int32 or int64.
        x: [..., k], fp32, fp16 or bf16.
        n: the number of rows, which row_offsets must have.
        bias: [n], fp32, fp16 or bf16.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, another n, malformed row_offsets on the CPU.

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> octavo.ops.csr_matmul(values, columns, row_offsets, torch.ones(1, 2), n=2)
        tensor([[2., 7.]])
    """
    return torch.ops.octavo.csr_matmul(values, columns, row_offsets, x, n, bias)


@fake("csr_matmul")
def _(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def csr_matmul_add(out: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor) -> None:
    """``out += x @ S.T``, in place: the sum and the addition in fp32, then one rounding to out's dtype.

    Everything else as `csr_matmul`. No gradient passes through it.

    Args:
        out: [..., n], contiguous, fp32, fp16 or bf16.
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32 or uint16.
        row_offsets: [n + 1], int32 or int64.
        x: [..., k], fp32, fp16 or bf16; not memory of out.

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> out = torch.ones(1, 2)
        >>> octavo.ops.csr_matmul_add(out, values, columns, row_offsets, torch.ones(1, 2))
        >>> out
        tensor([[3., 8.]])
    """
    torch.ops.octavo.csr_matmul_add(out, values, columns, row_offsets, x)


@fake("csr_matmul_add")
def _(out: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor) -> None:
    return None


def csr_matmul_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, g: Tensor, k: int) -> Tensor:
    """``g @ S``: the gradient of `csr_matmul` for x. fp32 accumulation, deterministic.

    On the CPU the rows of g are what is shared among threads, 16 to a task. On a GPU entries whose row does not ascend
    may be left out.

    Args:
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32 or uint16, ascending within a row.
        row_offsets: [n + 1], int32 or int64.
        g: [..., n], fp32, fp16 or bf16.
        k: the number of columns of S.

    Returns:
        [..., k], g's dtype.

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> octavo.ops.csr_matmul_transposed(values, columns, row_offsets, torch.ones(1, 2), k=2)
        tensor([[3., 6.]])
    """
    return torch.ops.octavo.csr_matmul_transposed(values, columns, row_offsets, g, k)


@fake("csr_matmul_transposed")
def _(values: Tensor, columns: Tensor, row_offsets: Tensor, g: Tensor, k: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], k))


def csr_grad_values(
    columns: Tensor, row_offsets: Tensor, g: Tensor, x: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``g.T @ x`` at the entries of S only: the gradient of `csr_matmul` for values. fp32 sums, deterministic.

    ``out[e] = sum_j g[j, i] * x[j, columns[e]]`` for entry e of row i, j over all leading dimensions; 0 for a column
    outside [0, k).

    Args:
        columns: [nnz], int32 or uint16.
        row_offsets: [n + 1], int32 or int64.
        g: [..., n], fp32, fp16 or bf16.
        x: [..., k], g's dtype and leading dimensions.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        [nnz].

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> octavo.ops.csr_grad_values(columns, row_offsets, torch.ones(1, 2), torch.tensor([[5.0, 7.0]]))
        tensor([7., 5., 7.])
    """
    return torch.ops.octavo.csr_grad_values(columns, row_offsets, g, x, dtype)


@fake("csr_grad_values")
def _(columns: Tensor, row_offsets: Tensor, g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(columns.shape, dtype=dtype)
