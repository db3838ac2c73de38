"""Differentiable functions over the operators. Quantization is passed straight through: its derivative is taken as 1,
and elements beyond the int8 range do not exist (the scale is the row's own absmax), so nothing is clipped.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.gradients import as_rows, autocast, bias_grad, needs_grad
from . import ops

# Columns of the weight that are dequantized at a time in the backward pass: [n, 1024] in 16 bit stays in cache or is
# small beside the activations, and is wide enough to keep the product at full speed.
_BACKWARD_COLUMNS = 1024


def _input_grad(
    grad: Tensor, weight: Tensor, scale: Tensor, outlier_slot: Tensor | None, outlier_weight: Tensor | None
) -> Tensor:
    """``grad @ dequantized weight`` in grad's dtype, without the whole dequantized weight in memory.

    By columns of the weight, not rows: each output is then one product, rounded once, and there is nothing to add up.
    """
    k, rows = weight.shape[1], as_rows(grad)

    def columns(begin: int) -> Tensor:
        return rows @ ops.dequantize_rowwise(weight[:, begin : begin + _BACKWARD_COLUMNS], scale, grad.dtype)

    if k <= _BACKWARD_COLUMNS:
        out = columns(0)
    else:
        out = rows.new_empty((rows.shape[0], k))
        for begin in range(0, k, _BACKWARD_COLUMNS):
            out[:, begin : begin + _BACKWARD_COLUMNS] = columns(begin)
    if outlier_slot is not None and outlier_weight is not None and outlier_weight.shape[0] > 0:
        # A gather with a static shape: no list of the kept columns, which would wait for the device.
        kept = rows @ outlier_weight.to(grad.dtype).t()
        out = torch.where(outlier_slot >= 0, kept[:, outlier_slot.clamp(min=0)], out)
    return out.reshape(*grad.shape[:-1], k)


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        threshold: float,
        outlier_slot: Tensor | None,
        outlier_weight: Tensor | None,
    ) -> Tensor:
        return ops.int8_linear(x, weight, weight_scale, bias, threshold, outlier_slot, outlier_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, weight_scale, bias, _, outlier_slot, outlier_weight = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight, weight_scale, outlier_slot, outlier_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _input_grad(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        grad_bias = bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None, None, None


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    outlier_slot: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    """The LLM.int8() product with an int8 weight (arXiv 2208.07339, section 3), differentiable in x and bias.

    With O the columns of x where any ``|x| >= threshold``, in int8 outside of O and in 16 bit within::

        y = (codes[:, ~O] @ weight[:, ~O].T) * scale[:, None] * weight_scale
          + x[:, O] @ (weight[:, O] * weight_scale[:, None]).T + bias

    Backward, for g = dL/dy: ``grad_x = g @ (weight * weight_scale[:, None])`` as a product in x's dtype, with the kept
    columns of `outlier_weight` in place of the int8 ones; ``grad_bias = g.sum(0)``, accumulated in fp32. The
    dequantized weight is never in memory as a whole, and x is not saved. Under autocast x is cast to the autocast
    dtype first.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        weight: int8 [n, k].
        weight_scale: fp32 [n]; the weight is ``weight * weight_scale[:, None]``.
        bias: [n], fp32, fp16 or bf16.
        threshold: 0 (every column in int8) or positive; 6.0 in the paper.
        outlier_slot: int32 [k]: for columns whose unquantized weight was kept, the row of `outlier_weight`; else -1.
        outlier_weight: [slots, n], fp32, fp16 or bf16.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, a negative or NaN threshold, a gradient of a gradient.
        ValueError: weight_scale or outlier_weight requires a gradient: there is none.

    Example:
        >>> import octavo, torch
        >>> weight, scale = octavo.quantize_rowwise(torch.eye(3, 4))
        >>> x = torch.tensor([[1.0, 50.0, 2.0, 0.0]], requires_grad=True)
        >>> y = octavo.int8_matmul(x, weight, scale, threshold=6.0)
        >>> y.detach().round(decimals=1)
        tensor([[ 1., 50.,  2.]])
        >>> y.sum().backward()
        >>> x.grad.round(decimals=4)
        tensor([[1., 1., 1., 0.]])
    """
    x = autocast(x)
    if any(t is not None and t.requires_grad for t in (weight_scale, outlier_weight)) and torch.is_grad_enabled():
        name = "weight_scale" if weight_scale.requires_grad else "outlier_weight"
        raise ValueError(f"int8_matmul is differentiable in x and bias, but {name} requires a gradient")
    if not needs_grad(x, bias):
        return ops.int8_linear(x, weight, weight_scale, bias, threshold, outlier_slot, outlier_weight)
    out = _Int8Matmul.apply(  # type: ignore[no-untyped-call]
        x, weight, weight_scale, bias, threshold, outlier_slot, outlier_weight
    )
    return cast(Tensor, out)


class _Int8LinearTrain(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        codes, scale = ops.quantize_rowwise(weight, 0.0)
        return ops.int8_linear(x, codes, scale, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _ = inputs
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, x if ctx.needs_input_grad[1] else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if weight is not None:
            grad_x = torch.matmul(grad, weight.to(grad.dtype))
        if x is not None:
            grad_weight = torch.matmul(as_rows(grad).t(), as_rows(x)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = bias_grad(grad, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def int8_linear_train(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """`torch.nn.functional.linear` with an int8 forward product, for a 16- or 32-bit weight in training.

    The weight is quantized on the fly, each row by its own absmax, from its own dtype::

        y = int8_matmul(x, *quantize_rowwise(weight), bias, threshold)

    Backward, straight through both quantizations and in x's dtype (fp32 accumulation inside the products, as
    `torch.matmul` does): ``grad_x = g @ weight`` with the true weight, not its codes; ``grad_weight = g.T @ x`` with
    the true activations, returned in the weight's dtype; ``grad_bias = g.sum(0)``, accumulated in fp32. The gradient of
    the weight sums over the whole batch, which is where 8-bit noise hurts most: it stays in 16 or 32 bit. Under
    autocast x is cast to the autocast dtype first, and the gradients are products in that dtype.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        weight: [n, k], fp32, fp16 or bf16.
        bias: [n], fp32, fp16 or bf16.
        threshold: 0 (every column in int8) or positive: outlier columns of x (LLM.int8(), arXiv 2208.07339, section 3)
            multiply the dequantized codes in 16 bit.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, a negative or NaN threshold, a gradient of a gradient.

    Example:
        >>> import octavo, torch
        >>> from octavo.int8 import int8_linear_train
        >>> weight = torch.ones(3, 4, requires_grad=True)
        >>> int8_linear_train(torch.ones(2, 4), weight).sum().backward()
        >>> weight.grad.shape
        torch.Size([3, 4])
    """
    x = autocast(x)
    if not needs_grad(x, weight, bias):
        codes, scale = ops.quantize_rowwise(weight, 0.0)
        return ops.int8_linear(x, codes, scale, bias, threshold)
    out = _Int8LinearTrain.apply(x, weight, bias, threshold)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)
