"""`csr_matmul`: the product with a sparse matrix in compressed rows, differentiable in x, values and bias."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.gradients import autocast, bias_grad, needs_grad
from . import ops


class _CsrMatmul(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None) -> Tensor:
        return ops.csr_matmul(values, columns, row_offsets, x, n, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, columns, row_offsets, x, _, bias = inputs
        ctx.values_dtype, ctx.k, ctx.bias_dtype = values.dtype, x.shape[-1], None if bias is None else bias.dtype
        for_values, for_x = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(values if for_x else None, columns, row_offsets, x if for_values else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, columns, row_offsets, x = ctx.saved_tensors
        grad_values = grad_x = None
        if x is not None:
            grad_values = ops.csr_grad_values(columns, row_offsets, grad, x, ctx.values_dtype)
        if values is not None:
            grad_x = ops.csr_matmul_transposed(values, columns, row_offsets, grad, ctx.k)
        grad_bias = bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return grad_values, None, None, grad_x, None, grad_bias


def csr_matmul(
    values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, n: int, bias: Tensor | None = None
) -> Tensor:
    """``x @ S.T + bias`` for a sparse S in compressed rows, differentiable in x, values and bias.

    S is `values` at `columns`, row i being the entries from ``row_offsets[i]`` to ``row_offsets[i + 1]``; columns
    ascend within a row. fp32 accumulation, deterministic, forward and backward; see `octavo.ops.csr_matmul` for special
    values and malformed input, `dense_to_csr` for how to make one.

    Backward, for g = dL/dy: ``grad_x = g @ S``; ``grad_values[e] = sum_j g[j, row(e)] * x[j, columns[e]]``, the dense
    gradient at the stored entries only, without the dense gradient; ``grad_bias = g.sum(0)``. Under autocast x is cast
    to the autocast dtype first.

    Args:
        values: [nnz], fp32, fp16 or bf16.
        columns: [nnz], int32, or uint16 for k up to 65536.
        row_offsets: [n + 1], int32 or int64.
        x: [..., k], fp32, fp16 or bf16.
        n: the number of rows of S.
        bias: [n], fp32, fp16 or bf16.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, malformed row_offsets on the CPU, a gradient of a gradient.

    Example:
        >>> import octavo, torch
        >>> values, columns, row_offsets = octavo.sparse.dense_to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> octavo.csr_matmul(values, columns, row_offsets, x, n=2).sum().backward()
        >>> x.grad
        tensor([[3., 6.]])
    """
    x = autocast(x)
    if not needs_grad(values, x, bias):
        return ops.csr_matmul(values, columns, row_offsets, x, n, bias)
    out = _CsrMatmul.apply(values, columns, row_offsets, x, n, bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)
