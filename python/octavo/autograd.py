"""Differentiable functions over the operators. Quantization is passed straight through: its derivative is taken as 1,
and elements beyond the int8 range do not exist (the scale is the row's own absmax), so nothing is clipped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops

if TYPE_CHECKING:
    from .nf4 import NF4Weight
    from .spqr import SpQRWeight

# Columns of the weight that are dequantized at a time in the backward pass: [n, 1024] in 16 bit stays in cache or is
# small beside the activations, and is wide enough to keep the product at full speed.
_BACKWARD_COLUMNS = 1024


def _autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype where autocast is on, as for `torch.nn.functional.linear`."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    # Autocast leaves float64 and integers alone; so here, and the op refuses them.
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _needs_grad(*tensors: Tensor | None) -> bool:
    # In forward mode too the call must go through the Function: it has no jvp and says so, where the bare operator
    # would drop the tangent and give a derivative of zero.
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return _rows(grad).sum(0, dtype=torch.float32).to(dtype)


def _input_grad(
    grad: Tensor, weight: Tensor, scale: Tensor, outlier_slot: Tensor | None, outlier_weight: Tensor | None
) -> Tensor:
    """``grad @ dequantized weight`` in grad's dtype, without the whole dequantized weight in memory.

    By columns of the weight, not rows: each output is then one product, rounded once, and there is nothing to add up.
    """
    k, rows = weight.shape[1], _rows(grad)

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
        grad_bias = _bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
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
    """
    x = _autocast(x)
    if any(t is not None and t.requires_grad for t in (weight_scale, outlier_weight)) and torch.is_grad_enabled():
        name = "weight_scale" if weight_scale.requires_grad else "outlier_weight"
        raise ValueError(f"int8_matmul is differentiable in x and bias, but {name} requires a gradient")
    if not _needs_grad(x, bias):
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
            grad_weight = torch.matmul(_rows(grad).t(), _rows(x)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(grad, ctx.bias_dtype)
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
    """
    x = _autocast(x)
    if not _needs_grad(x, weight, bias):
        codes, scale = ops.quantize_rowwise(weight, 0.0)
        return ops.int8_linear(x, codes, scale, bias, threshold)
    out = _Int8LinearTrain.apply(x, weight, bias, threshold)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


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
        grad_bias = _bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_bias, *[None] * 8)


def spqr_matmul_flat(
    x: Tensor, tensors: tuple[Tensor | None, ...], bias: Tensor | None, sizes: tuple[int, ...]
) -> Tensor:
    """`spqr_matmul` on the tensors of `SpQRWeight.arguments` and n, group_size, stats_group_size, scale_bits,
    zero_bits."""
    x = _autocast(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("spqr_matmul is differentiable in x and bias, but a tensor of the weight requires a gradient")
    if not _needs_grad(x, bias):
        arguments: tuple[Any, ...] = (x, *tensors, bias, *sizes)
        return ops.spqr_linear(*arguments)
    return cast(Tensor, _SpQRMatmul.apply(x, bias, sizes, *tensors))  # type: ignore[no-untyped-call]


def spqr_matmul(x: Tensor, w: SpQRWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with an SpQR weight (arXiv 2306.03078), differentiable in x and bias.

    See `octavo.spqr_linear` for what W is. Backward, for g = dL/dy: ``grad_x = g @ W`` with ``w.dequantize(g.dtype)``
    as a product in g's dtype, one rounding of each sum; ``grad_bias = g.sum(0)``, accumulated in fp32. The forward pass
    never dequantizes more than its kernel needs at a time, and x is not saved; the backward pass holds this one weight
    dequantized, n * k elements of g's dtype, while it multiplies by it. (Part by part would take less: but outliers are
    not sorted by column, and by rows the parts would have to be added up in g's dtype.) Under autocast x is cast to the
    autocast dtype first.

    Args:
        x: [..., w.k], fp32, fp16 or bf16.
        w: the weight, on x's device. `SpQRWeight.validate` says whether its values are sound; this does not.
        bias: [w.n], fp32, fp16 or bf16.

    Returns:
        [..., w.n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, sizes that are not supported, a gradient of a gradient.
        ValueError: a tensor of w requires a gradient: there is none.
    """
    sizes = (w.n, w.group_size, w.stats_group_size, w.scale_bits, w.zero_bits)
    return spqr_matmul_flat(x, w.arguments(), bias, sizes)


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
        grad_bias = _bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
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
    x = _autocast(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("nf4_matmul is differentiable in x and bias, but a tensor of the weight requires a gradient")
    if not _needs_grad(x, bias):
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
        [..., n], x's dtype; sums and rounding as in `octavo.nf4_linear`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, a gradient of a gradient.
        ValueError: w is not a matrix; a tensor of w requires a gradient: there is none.
    """
    if len(w.shape) != 2:
        raise ValueError(f"nf4_matmul: w must be a matrix [n, k], got shape {list(w.shape)}")
    if x.dim() and x.shape[-1] != w.shape[1]:
        raise RuntimeError(f"nf4_matmul: x of shape {list(x.shape)} and w of shape {list(w.shape)} differ in k")
    return nf4_matmul_flat(x, w.tensors(), bias, w.shape[0], w.quant_type, w.blocksize)


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
        grad_bias = _bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
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
    """
    x = _autocast(x)
    if not _needs_grad(values, x, bias):
        return ops.csr_matmul(values, columns, row_offsets, x, n, bias)
    out = _CsrMatmul.apply(values, columns, row_offsets, x, n, bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)
