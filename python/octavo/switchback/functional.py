"""SwitchBack (arXiv 2304.13013): linear layers whose products are int8 in training, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.checks import FLOATS, MAX_K, dtype_name
from ..core.gradients import as_rows, autocast, bias_grad, needs_grad
from ..int8 import ops


@dataclass(frozen=True)
class Variant:
    """How one variant computes its three products.

    Attributes:
        tensorwise: the weight has one scale; else one for each row, and in the backward pass one for each column.
        keeps: what of x is kept for the weight's gradient: "x" itself, its "codes", or its "columns" as int8 codes of
            their own, for a product in int8.
    """

    tensorwise: bool
    keeps: str


INT8_VARIANTS = {
    "switchback": Variant(True, "x"),
    "memory_efficient": Variant(True, "codes"),
    "vectorwise": Variant(False, "x"),
    "all_int8": Variant(False, "columns"),
}
VARIANTS = (*INT8_VARIANTS, "fp8")


class QuantizedWeight(NamedTuple):
    """A weight [n, k] as both int8 products need it: see `switchback_weight`.

    Attributes:
        codes: int8 [n, k], ``weight ~ codes * scale[:, None]``.
        scale: fp32 [n], or [] for the whole tensor.
        transposed: int8 [k, n], ``weight.T ~ transposed * transposed_scale[:, None]``, or None.
        transposed_scale: fp32 [k], or None: it is `scale`, of the whole tensor.

    Example:
        >>> import octavo, torch
        >>> quantized = octavo.switchback.switchback_weight(torch.ones(3, 4), transpose=False)
        >>> quantized.codes.dtype, quantized.scale.shape, quantized.transposed
        (torch.int8, torch.Size([]), None)
    """

    codes: Tensor
    scale: Tensor
    transposed: Tensor | None = None
    transposed_scale: Tensor | None = None


class Watcher(Protocol):
    """Told that a gradient of the weight was computed."""

    used: bool


def check_variant(variant: str) -> str:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    return variant


def check_options(variant: str, k_split: int | None, stochastic_rounding: bool) -> None:
    """ValueError unless a layer can have these settings."""
    check_variant(variant)
    if k_split is not None and (isinstance(k_split, bool) or not isinstance(k_split, int) or k_split < 1):
        raise ValueError(f"k_split must be a positive number of rows, got {k_split!r}")
    if not isinstance(stochastic_rounding, bool):
        raise ValueError(f"stochastic_rounding must be True or False, got {stochastic_rounding!r}")
    if variant != "all_int8" and (k_split is not None or stochastic_rounding):
        name = "stochastic_rounding" if k_split is None else "k_split"
        raise ValueError(f"{name} is of the weight gradient in int8, of variant all_int8; the variant is {variant}")


def _check_operands(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for what, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise RuntimeError(f"{name}: {what} must be float32, float16 or bfloat16, got {dtype_name(tensor)}")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{name}: x of shape {list(x.shape)} and weight of shape {list(weight.shape)} do not make a product: they "
            "must be [..., k] and [n, k]"
        )
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (weight.shape[0],)):
        raise RuntimeError(
            f"{name}: bias must be float32, float16 or bfloat16 [{weight.shape[0]}], got {dtype_name(bias)} "
            f"{list(bias.shape)}"
        )


def switchback_weight(weight: Tensor, variant: str = "switchback", transpose: bool = True) -> QuantizedWeight:
    """The int8 weight of a variant of `switchback_linear`: by one look at the weight both what the forward and what the
    backward product needs.

    Args:
        weight: [n, k], fp32, fp16 or bf16.
        variant: of `switchback_linear`, but "fp8".
        transpose: False: only what the forward product needs.

    Raises:
        ValueError: an unknown variant, or "fp8"; a weight that is no matrix.

    Example:
        >>> import octavo, torch
        >>> weight = torch.ones(3, 4)
        >>> quantized = octavo.switchback.switchback_weight(weight)
        >>> quantized.codes.shape, quantized.transposed.shape
        (torch.Size([3, 4]), torch.Size([4, 3]))
        >>> octavo.switchback_linear(torch.ones(2, 4), weight, quantized=quantized).shape
        torch.Size([2, 3])
    """
    if check_variant(variant) == "fp8":
        raise ValueError("variant fp8 is a simulation: there is no int8 weight")
    if weight.dim() != 2:
        raise ValueError(f"switchback_weight: the weight must be a matrix [n, k], got shape {list(weight.shape)}")
    weight = weight.detach()  # the products' derivative passes straight through
    if INT8_VARIANTS[variant].tensorwise:
        if not transpose:
            return QuantizedWeight(*ops.quantize_tensorwise(weight))
        codes, transposed, scale = ops.quantize_tensorwise_transpose(weight)
        return QuantizedWeight(codes, scale, transposed)
    if not transpose:
        return QuantizedWeight(*ops.quantize_rowwise(weight))
    return QuantizedWeight(*ops.quantize_rowwise_columnwise_transpose(weight))


# ---- the product ---------------------------------------------------------------------------------------------------


def _seed(like: Tensor) -> Tensor:
    """The seed of a random rounding, drawn on the device from the generator of torch: `torch.manual_seed` repeats it,
    and every replay of a CUDA graph draws anew."""
    return torch.randint(1 << 62, (1,), device=like.device)


def _parts(rows: int, k_split: int | None) -> list[tuple[int, int]]:
    """Rows of x and grad that one int8 product of the weight's gradient sums over."""
    size = min(k_split or MAX_K, MAX_K)
    return [(begin, min(begin + size, rows)) for begin in range(0, max(rows, 1), size)]


def _rows_and_columns(
    x: Tensor, k_split: int | None, stochastic: bool, with_rows: bool
) -> tuple[tuple[Tensor, Tensor] | None, list[Tensor]]:
    """Row codes and scale of x, if wanted, and (column codes, scale) of each part of its rows."""
    parts = _parts(x.shape[0], k_split)
    if len(parts) == 1 and with_rows:
        codes, scale, *columns = ops.quantize_rowwise_columnwise_transpose(x, _seed(x) if stochastic else None)
        return (codes, scale), columns
    columns = []
    for begin, end in parts:  # a seed each, since elements of a part count from 0
        columns += ops.quantize_columnwise_transpose(x[begin:end], _seed(x) if stochastic else None)
    return (ops.quantize_rowwise(x) if with_rows else None), columns


def _weight_grad_int8(grad: list[Tensor], x: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``grad.T @ x`` of column codes: the product of each part in int32, their sum in fp32."""
    total = None
    for i in range(0, len(x), 2):
        out_dtype = dtype if len(x) == 2 else torch.float32
        part = ops.int8_gemm(grad[i], x[i], grad[i + 1], x[i + 1], None, out_dtype)
        total = part if total is None else total.add_(part)
    assert total is not None  # at least one part
    return total.to(dtype)


class _SwitchBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        transposed: Tensor | None,
        transposed_scale: Tensor | None,
        variant: str,
        k_split: int | None,
        stochastic: bool,
        watcher: Watcher | None,
    ) -> Tensor:
        keeps = INT8_VARIANTS[variant].keeps
        for_x, for_weight = ctx.needs_input_grad[:2]
        rows = as_rows(x)
        kept: list[Tensor] = []
        if for_weight and keeps == "columns":
            of_rows, kept = _rows_and_columns(rows, k_split, stochastic, with_rows=True)
            x_codes, x_scale = cast(tuple[Tensor, Tensor], of_rows)
        else:
            x_codes, x_scale = ops.quantize_rowwise(rows)
            if for_weight:
                kept = [x] if keeps == "x" else [x_codes, x_scale]
        out = ops.int8_gemm(x_codes, codes, x_scale, scale, bias, x.dtype)
        ctx.again = for_x and transposed is None  # then the weight is quantized again in the backward pass
        of_weight: tuple[Tensor | None, ...] = (None, None)
        if for_x:
            of_weight = (
                (weight, None) if ctx.again else (transposed, scale if transposed_scale is None else transposed_scale)
            )
        ctx.save_for_backward(*of_weight, *kept)
        ctx.variant, ctx.k_split, ctx.stochastic, ctx.watcher = variant, k_split, stochastic, watcher
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        transposed, transposed_scale, *kept = ctx.saved_tensors
        if ctx.again:
            _, scale, transposed, transposed_scale = switchback_weight(transposed, ctx.variant)
            transposed_scale = scale if transposed_scale is None else transposed_scale
        keeps = INT8_VARIANTS[ctx.variant].keeps
        rows = as_rows(grad).contiguous()
        of_rows, grad_x, grad_weight, grad_bias = None, None, None, None
        if for_weight and ctx.watcher is not None:
            ctx.watcher.used = True
        if for_weight and keeps == "columns":
            of_rows, columns = _rows_and_columns(rows, ctx.k_split, ctx.stochastic, with_rows=for_x)
            grad_weight = _weight_grad_int8(columns, kept, ctx.weight_dtype)
        if for_x:
            grad_codes, grad_scale = of_rows or ops.quantize_rowwise(rows)
            grad_x = ops.int8_gemm(grad_codes, transposed, grad_scale, transposed_scale, None, grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if for_weight and keeps != "columns":
            x = as_rows(kept[0]) if keeps == "x" else ops.dequantize_rowwise(kept[0], kept[1], grad.dtype)
            grad_weight = torch.mm(rows.t(), x).to(ctx.weight_dtype)
        if for_bias:
            grad_bias = bias_grad(grad, ctx.bias_dtype)
        return (grad_x, grad_weight, grad_bias, *[None] * 8)


def switchback_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    variant: str = "switchback",
    quantized: QuantizedWeight | None = None,
    *,
    k_split: int | None = None,
    stochastic_rounding: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear` with int8 products, forward and for the input's gradient (SwitchBack, arXiv
    2304.13013, section 2.2), for a 16- or 32-bit weight in training.

    With ``Q_row(x) = quantize_rowwise(x)``, ``Q(w) = quantize_tensorwise(w)``, and int32 sums that the scales, the bias
    and x's dtype meet in the product's epilogue::

        y      = dequantize(Q_row(x) @ Q(w).T) + bias
        grad_x = dequantize(Q_row(g) @ Q(w))               g = dL/dy
        grad_w = g.T @ x                                   in x's dtype, not int8
        grad_b = g.sum(0)                                  accumulated in fp32

    The weight's gradient sums over all rows of the batch, many more than the features that the other products sum
    over, and the noise of int8 grows with them: it stays in 16 bit. Quantization is passed straight through.

    | variant            | weight's scales               | kept for grad_w                                   |
    |--------------------|-------------------------------|---------------------------------------------------|
    | "switchback"       | one                           | x                                                 |
    | "memory_efficient" | one                           | Q_row(x), dequantized for the product             |
    | "vectorwise"       | a row's; backward: a column's | x                                                 |
    | "all_int8"         | a row's; backward: a column's | x by columns in int8, for a product in int8       |
    | "fp8"              | see `fp8_linear`              | x in fp8                                          |

    The last but one is the baseline of LLM.int8() (2208.07339) that the paper compares with; its two options make it
    better. Under autocast x is cast to the autocast dtype first. Rows with special values: as in `octavo.ops`: a row
    of x (or g) with a NaN or Inf makes that row of y (of grad_x) NaN, and what of grad_w it takes part in; a weight
    with one, with one scale, makes all of y and grad_x NaN. Zero rows give zeros.

    Args:
        x: [..., k], fp32, fp16 or bf16; k and n at most 131071.
        weight: [n, k], fp32, fp16 or bf16; quantized from its own dtype.
        bias: [n], fp32, fp16 or bf16.
        variant: of the table.
        quantized: `switchback_weight(weight, variant)`, if it is at hand; its values are taken at their word. Without
            `transposed`, the weight is quantized again in the backward pass. Not of "fp8".
        k_split: of "all_int8": rows of x and g that share a column's scale in ``grad_w``; parts are added in fp32.
        stochastic_rounding: of "all_int8": x's and g's column codes are rounded at random, so that ``grad_w`` is right
            in the mean.

    Returns:
        [..., n], x's dtype.

    Raises:
        ValueError: an unknown variant, an option of another variant.
        RuntimeError: mismatched shapes, dtypes or devices, a gradient of a gradient.

    Example:
        >>> import octavo, torch
        >>> weight = torch.ones(3, 4, requires_grad=True)
        >>> y = octavo.switchback_linear(torch.ones(2, 4), weight)
        >>> y.detach().round(decimals=4)
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
        >>> y.sum().backward()
        >>> weight.grad.shape
        torch.Size([3, 4])
    """
    check_options(variant, k_split, stochastic_rounding)
    return training_linear(x, weight, bias, variant, quantized, k_split, stochastic_rounding, None)


def training_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    variant: str,
    quantized: QuantizedWeight | None,
    k_split: int | None,
    stochastic_rounding: bool,
    watcher: Watcher | None,
) -> Tensor:
    """`switchback_linear` with options that were checked, for modules that watch what becomes of their weight."""
    if variant == "fp8":
        if quantized is not None:
            raise ValueError("variant fp8 is a simulation: it takes no quantized weight")
        return fp8_linear(x, weight, bias)
    x = autocast(x)
    _check_operands("switchback_linear", x, weight, bias)
    if quantized is not None and quantized.codes.shape != weight.shape:
        raise RuntimeError(
            f"switchback_linear: quantized is of a weight of shape {list(quantized.codes.shape)}, not of "
            f"{list(weight.shape)}"
        )
    differentiable = needs_grad(x, weight, bias)
    if quantized is None:
        quantized = switchback_weight(weight, variant, transpose=differentiable and x.requires_grad)
    if not differentiable:
        codes, scale = ops.quantize_rowwise(x)
        return ops.int8_gemm(codes, quantized.codes, scale, quantized.scale, bias, x.dtype)
    out = _SwitchBack.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, *quantized, variant, k_split, stochastic_rounding, watcher
    )
    return cast(Tensor, out)


# ---- fp8, simulated ------------------------------------------------------------------------------------------------


def _to_fp8(x: Tensor, dtype: torch.dtype, like: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale rounded to fp8 values, in the dtype that products of `like` have, and the scale: that of the tensor's
    absmax to the largest fp8 value. A tensor whose absmax is below 2**-100, where the inverse may leave fp32, counts as
    zero: scale 0. NaN or Inf make the scale NaN."""
    values = x.float()
    absmax = values.abs().amax() if values.numel() else values.new_zeros(())
    most = torch.finfo(dtype).max
    tiny = absmax < 2.0**-100
    scale = torch.where(tiny, 0.0, absmax / most).where(absmax.isfinite(), torch.nan)
    inverse = torch.where(tiny, 0.0, most / absmax)
    codes = (values * inverse).to(dtype)
    # fp8 values are exact in bf16, and in fp16, too, where sums of their products would not stay in range.
    return codes.to(torch.bfloat16 if like is torch.bfloat16 else torch.float32), scale


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_codes, x_scale = _to_fp8(as_rows(x), torch.float8_e4m3fn, x.dtype)
        codes, scale = _to_fp8(weight, torch.float8_e4m3fn, x.dtype)
        out = torch.mm(x_codes, codes.t()).float() * x_scale * scale  # one by one: both may be large
        if bias is not None:
            out = out + bias.float()
        ctx.save_for_backward(x_codes, x_scale, codes, scale)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, codes, scale = ctx.saved_tensors
        g, g_scale = _to_fp8(as_rows(grad), torch.float8_e5m2, grad.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.mm(g, codes).float() * g_scale * scale).to(grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (torch.mm(g.t(), x_codes).float() * g_scale * x_scale).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = bias_grad(grad, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with all operands rounded to fp8 values, tensor by tensor (arXiv 2304.13013, section
    2.3): a simulation, as fast as the 16-bit product that it is made of.

    ``F_e4m3(x) = round_e4m3(x * 448 / max |x|) * max |x| / 448``, and likewise e5m2 with 57344::

        y      = F_e4m3(x) @ F_e4m3(w).T + bias
        grad_x = F_e5m2(g) @ F_e4m3(w)
        grad_w = F_e5m2(g).T @ F_e4m3(x)
        grad_b = g.sum(0)

    One scale for a tensor leaves little to its small elements once some are large. The paper's training is stable where
    features stay small: with `octavo.nn.LayerScale`, initialised to zero, at the end of each residual branch.

    Args:
        x: [..., k], fp32, fp16 or bf16; under autocast cast to the autocast dtype. Products are in bf16 for bf16, else
            in fp32.
        weight: [n, k], fp32, fp16 or bf16; rounded from its own dtype.
        bias: [n].

    Returns:
        [..., n], x's dtype. NaN or Inf anywhere in an operand makes all of the product NaN; an operand without any
        element of 2**-100 or more counts as zero.

    Raises:
        RuntimeError: mismatched shapes, other dtypes, a gradient of a gradient.

    Example:
        >>> import octavo, torch
        >>> octavo.switchback.fp8_linear(torch.ones(2, 4), torch.ones(3, 4)).shape
        torch.Size([2, 3])
    """
    x = autocast(x)
    _check_operands("fp8_linear", x, weight, bias)
    return cast(Tensor, _Fp8Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]
