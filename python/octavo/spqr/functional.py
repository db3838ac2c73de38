"""`spqr_matmul`: the product with an SpQR weight, differentiable in x and bias."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.gradients import autocast, bias_grad, needs_grad
from . import ops
from .weight import SpQRWeight


class _SpQRMatmul(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, sizes: tuple[int, ...], *tensors: Any) -> Tensor:
        arguments: tuple[Any, ...] = (x, *tensors, bias, *sizes)
        return ops.spqr_linear(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.sizes, *tensors = inputs
        ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            n, *sizes = ctx.sizes
            arguments: tuple[Any, ...] = (*ctx.saved_tensors, n, ctx.k, grad.dtype, *sizes)
            grad_x = torch.matmul(grad, ops.spqr_dequantize(*arguments))
        grad_bias = bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_bias, *[None] * 8)


def spqr_matmul_flat(
    x: Tensor, tensors: tuple[Tensor | None, ...], bias: Tensor | None, sizes: tuple[int, ...]
) -> Tensor:
    """`spqr_matmul` on the tensors of `SpQRWeight.arguments` and n, group_size, stats_group_size, scale_bits,
    zero_bits."""
    x = autocast(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("spqr_matmul is differentiable in x and bias, but a tensor of the weight requires a gradient")
    if not needs_grad(x, bias):
        arguments: tuple[Any, ...] = (x, *tensors, bias, *sizes)
        return ops.spqr_linear(*arguments)
    return cast(Tensor, _SpQRMatmul.apply(x, bias, sizes, *tensors))  # type: ignore[no-untyped-call]


def spqr_matmul(x: Tensor, w: SpQRWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with an SpQR weight (arXiv 2306.03078), differentiable in x and bias.

    See `octavo.ops.spqr_linear` for what W is. Backward, for g = dL/dy: ``grad_x = g @ W`` with
    ``w.dequantize(g.dtype)`` as a product in g's dtype, one rounding of each sum; ``grad_bias = g.sum(0)``, accumulated
    in fp32. The forward pass never dequantizes more than its kernel needs at a time, and x is not saved; the backward
    pass holds this one weight dequantized, n * k elements of g's dtype, while it multiplies by it. (Part by part would
    take less: but outliers are not sorted by column, and by rows the parts would have to be added up in g's dtype.)
    Under autocast x is cast to the autocast dtype first.

    Args:
        x: [..., w.k], fp32, fp16 or bf16.
        w: the weight, on x's device. `SpQRWeight.validate` says whether its values are sound; this does not.
        bias: [w.n], fp32, fp16 or bf16.

    Returns:
        [..., w.n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, sizes that are not supported, a gradient of a gradient.
        ValueError: a tensor of w requires a gradient: there is none.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> w = SpQRWeight.pack(quantize_weight(torch.ones(16, 32), None, settings))
        >>> octavo.spqr_matmul(torch.ones(2, 32), w).shape
        torch.Size([2, 16])
    """
    sizes = (w.n, w.group_size, w.stats_group_size, w.scale_bits, w.zero_bits)
    return spqr_matmul_flat(x, w.arguments(), bias, sizes)
