"""`nf4_matmul`: the product with a weight in 4 bits, differentiable in x and bias."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.gradients import autocast, bias_grad, needs_grad
from . import ops
from .weight import NF4Weight


class _Nf4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        n: int,
        quant_type: str,
        blocksize: int,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        return ops.nf4_linear(x, packed, absmax, nested_absmax, offset, bias, n, quant_type, blocksize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, _, ctx.quant_type, ctx.blocksize, *tensors = inputs
        ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            packed, absmax, nested_absmax, offset = ctx.saved_tensors
            weight = (packed, absmax, nested_absmax, offset)
            grad_x = ops.nf4_linear_transposed(grad, *weight, ctx.k, ctx.quant_type, ctx.blocksize)
        grad_bias = bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_bias, *[None] * 7)


def nf4_matmul_flat(
    x: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    n: int,
    quant_type: str,
    blocksize: int,
) -> Tensor:
    """`nf4_matmul` on the tensors of `NF4Weight.tensors`."""
    x = autocast(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("nf4_matmul is differentiable in x and bias, but a tensor of the weight requires a gradient")
    if not needs_grad(x, bias):
        return ops.nf4_linear(x, *tensors, bias, n, quant_type, blocksize)
    return cast(Tensor, _Nf4Matmul.apply(x, bias, n, quant_type, blocksize, *tensors))  # type: ignore[no-untyped-call]


def nf4_matmul(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with a low-bit weight (QLoRA, arXiv 2305.14314), differentiable in x and bias.

    W is ``w.dequantize()``, of any `quant_type`; it is never whole in memory, forward or backward. Backward, for
    g = dL/dy: ``grad_x = g @ W`` (`octavo.nf4_linear_transposed`) and ``grad_bias = g.sum(0)``, accumulated in fp32; x
    is not saved. Under autocast x is cast to the autocast dtype first.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        w: of `octavo.quantize_4bit`, shape [n, k], on x's device.
        bias: [n], fp32, fp16 or bf16.

    Returns:
        [..., n], x's dtype; sums and rounding as in `octavo.ops.nf4_linear`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, a gradient of a gradient.
        ValueError: w is not a matrix; a tensor of w requires a gradient: there is none.

    Example:
        >>> import octavo, torch
        >>> w = octavo.quantize_4bit(torch.eye(8, 64))
        >>> octavo.nf4_matmul(torch.ones(1, 64), w, bias=torch.ones(8))
        tensor([[2., 2., 2., 2., 2., 2., 2., 2.]])
    """
    if len(w.shape) != 2:
        raise ValueError(f"nf4_matmul: w must be a matrix [n, k], got shape {list(w.shape)}")
    if x.dim() and x.shape[-1] != w.shape[1]:
        raise RuntimeError(f"nf4_matmul: x of shape {list(x.shape)} and w of shape {list(w.shape)} differ in k")
    return nf4_matmul_flat(x, w.tensors(), bias, w.shape[0], w.quant_type, w.blocksize)
