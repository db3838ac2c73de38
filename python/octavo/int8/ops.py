"""The operators: one thin function per op, its fake (shape inference for torch.compile) right below it.

Everywhere ``value = code * scale`` with ``scale = absmax / 127`` in fp32. Activations are fp32, fp16 or bf16 and are
read in their own dtype. Any leading dimensions; every GEMM is ``a[m, k] x b[n, k]``. The operators are not
differentiable; :mod:`octavo.int8.functional` composes them into functions that are.

Rows with special values, the same on every backend: a zero row, or one whose absmax is below 2**-120, has codes 0 and
scale 0. A row with a NaN (or an Inf that is not an outlier) has codes 0 and scale NaN, so that everything computed
from it is NaN; no other row is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.fakes import fake as _fake
from .ops_transpose import quantize_columnwise_transpose as quantize_columnwise_transpose
from .ops_transpose import quantize_rowwise_columnwise_transpose as quantize_rowwise_columnwise_transpose
from .ops_transpose import quantize_tensorwise_transpose as quantize_tensorwise_transpose

# ---- quantization --------------------------------------------------------------------------------------------------


def quantize_rowwise(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 by its own absmax (LLM.int8(), arXiv 2208.07339, section 2 "vector-wise").

    ``scale[i] = max_j |x[i, j]| / 127``, ``codes[i, j] = clamp(round_half_even(x[i, j] / scale[i]), -127, 127)``,
    in one pass over memory. With ``threshold > 0``, elements with ``|x| >= threshold`` are left out of the absmax and
    coded 0 (Inf counts as such an element, NaN does not).

    Args:
        x: [..., k], fp32, fp16 or bf16.
        threshold: 0 (none) or positive.

    Returns:
        codes int8 [..., k] and scale fp32 [...].

    Raises:
        RuntimeError: wrong dtype, a 0-dimensional x, negative or NaN threshold.

    Example:
        >>> import octavo, torch
        >>> codes, scale = octavo.ops.quantize_rowwise(torch.tensor([[1.0, -127.0], [2.0, 0.5]]))
        >>> codes.tolist()
        [[1, -127], [127, 32]]
        >>> scale.shape, scale[0].item()
        (torch.Size([2]), 1.0)
    """
    return torch.ops.octavo.quantize_rowwise(x, threshold)


@_fake("quantize_rowwise")
def _(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def dequantize_rowwise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale[..., None]``, computed in fp32 and rounded once to `dtype`.

    Args:
        codes: int8 [..., k].
        scale: fp32 [...].
        dtype: of the result: fp32, fp16 or bf16.

    Example:
        >>> import octavo, torch
        >>> octavo.dequantize_rowwise(torch.tensor([[1, -127]], dtype=torch.int8), torch.tensor([0.5]))
        tensor([[  0.5000, -63.5000]])
    """
    return torch.ops.octavo.dequantize_rowwise(codes, scale, dtype)


@_fake("dequantize_rowwise")
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def quantize_columnwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each column to int8 by its own absmax over all rows (and leading dimensions).

    Returns codes int8 [..., k] and scale fp32 [k], with ``x ~ codes * scale``. Special values as for rows.

    Example:
        >>> import octavo, torch
        >>> codes, scale = octavo.ops.quantize_columnwise(torch.tensor([[127.0, 1.0], [-64.0, 0.5]]))
        >>> codes.tolist(), scale.shape
        ([[127, 127], [-64, 64]], torch.Size([2]))
    """
    return torch.ops.octavo.quantize_columnwise(x)


@_fake("quantize_columnwise")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[-1:], dtype=torch.float32)


def quantize_tensorwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to int8 by one absmax.

    Returns codes int8 of x's shape and scale fp32 [] (0-dimensional). Special values as for rows: one NaN or Inf
    makes the whole tensor codes 0 and scale NaN.

    Example:
        >>> import octavo, torch
        >>> codes, scale = octavo.ops.quantize_tensorwise(torch.tensor([[127.0, 1.0], [-64.0, 3.0]]))
        >>> codes.tolist(), scale
        ([[127, 1], [-64, 3]], tensor(1.))
    """
    return torch.ops.octavo.quantize_tensorwise(x)


@_fake("quantize_tensorwise")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((), dtype=torch.float32)


def quantize_rowwise_columnwise(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rowwise` and `quantize_columnwise` together, for training, where both products of x are needed.

    One read of x gives the row codes and both absmax; the column codes, which must wait for the last row, take a
    second one.

    Returns row codes int8 [..., k], row scale fp32 [...], column codes int8 [..., k], column scale fp32 [k].

    Example:
        >>> import octavo, torch
        >>> x = torch.tensor([[127.0, 1.0], [-64.0, 32.0]])
        >>> rows, row_scale, columns, column_scale = octavo.ops.quantize_rowwise_columnwise(x)
        >>> rows.tolist(), columns.tolist()
        ([[127, 1], [-127, 64]], [[127, 4], [-64, 127]])
    """
    return torch.ops.octavo.quantize_rowwise_columnwise(x)


@_fake("quantize_rowwise_columnwise")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def codes() -> Tensor:
        return x.new_empty(x.shape, dtype=torch.int8)

    row_scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return codes(), row_scale, codes(), x.new_empty(x.shape[-1:], dtype=torch.float32)


# ---- outlier columns -----------------------------------------------------------------------------------------------


def find_outlier_columns(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The columns that hold any ``|x| >= threshold`` (LLM.int8(), arXiv 2208.07339, section 3).

    Shapes do not depend on the data and the count stays on the device: no host synchronisation, capturable in a CUDA
    graph. NaN is not an outlier, Inf is.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        threshold: positive.

    Returns:
        columns int32 [k], ascending ids followed by -1, and count int32 [1].

    Example:
        >>> import octavo, torch
        >>> columns, count = octavo.ops.find_outlier_columns(torch.tensor([[1.0, 8.0, 0.0], [-6.0, 2.0, 1.0]]), 6.0)
        >>> columns, count
        (tensor([ 0,  1, -1], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return torch.ops.octavo.find_outlier_columns(x, threshold)


@_fake("find_outlier_columns")
def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[-1:], dtype=torch.int32), x.new_empty((1,), dtype=torch.int32)


def extract_columns(x: Tensor, columns: Tensor, count: Tensor) -> Tensor:
    """``x[..., columns]`` for the first `count` ids; the rest, and ids outside [0, k), give zeros.

    Pass ``columns[:capacity]`` for a narrower result than all k columns.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        columns: int32 [capacity].
        count: int32 [1].

    Returns:
        [..., capacity], x's dtype.

    Example:
        >>> import octavo, torch
        >>> x = torch.tensor([[1.0, 8.0, 0.0], [-6.0, 2.0, 1.0]])
        >>> columns, count = octavo.ops.find_outlier_columns(x, 6.0)
        >>> octavo.ops.extract_columns(x, columns, count)
        tensor([[ 1.,  8.,  0.],
                [-6.,  2.,  0.]])
    """
    return torch.ops.octavo.extract_columns(x, columns, count)


@_fake("extract_columns")
def _(x: Tensor, columns: Tensor, count: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns.shape[0]))


def extract_int8_columns(
    weight: Tensor, weight_scale: Tensor, columns: Tensor, count: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`extract_columns` of ``weight * weight_scale[:, None]``, for int8 codes.

    Args:
        weight: int8 [n, k].
        weight_scale: fp32 [n].
        columns: int32 [capacity].
        count: int32 [1].
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        [n, capacity].

    Example:
        >>> import octavo, torch
        >>> codes, scale = octavo.quantize_rowwise(torch.tensor([[127.0, 1.0, 3.0], [-127.0, 2.0, 4.0]]))
        >>> ids = torch.tensor([2], dtype=torch.int32)
        >>> octavo.ops.extract_int8_columns(codes, scale, ids, torch.ones(1, dtype=torch.int32))
        tensor([[3.],
                [4.]])
    """
    return torch.ops.octavo.extract_int8_columns(weight, weight_scale, columns, count, dtype)


@_fake("extract_int8_columns")
def _(weight: Tensor, weight_scale: Tensor, columns: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((weight.shape[0], columns.shape[0]), dtype=dtype)


# ---- products ------------------------------------------------------------------------------------------------------


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 codes, exact in int32.

    Args:
        a: int8 [..., k], k at most 131071 (beyond it a sum could leave int32).
        b: int8 [n, k].

    Returns:
        int32 [..., n].

    Example:
        >>> import octavo, torch
        >>> a = torch.tensor([[1, 2, 3]], dtype=torch.int8)
        >>> b = torch.tensor([[1, 1, 1], [0, -1, 100]], dtype=torch.int8)
        >>> octavo.ops.int8_mm(a, b)
        tensor([[  6, 298]], dtype=torch.int32)
    """
    return torch.ops.octavo.int8_mm(a, b)


@_fake("int8_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)


def int8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(a @ b.T) * a_scale[..., None] * b_scale + bias``, the sum exact in int32, the rest in fp32 in the epilogue.

    Args:
        a: int8 [..., k], k at most 131071.
        b: int8 [n, k].
        a_scale: fp32 [...] (one per row of a) or one element.
        b_scale: fp32 [n] or one element.
        bias: [n], fp32, fp16 or bf16.
        out_dtype: fp32, fp16 or bf16.

    Returns:
        [..., n] in `out_dtype`; no int32 buffer is ever in memory.

    Example:
        >>> import octavo, torch
        >>> a, b = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4], [0, 1]], dtype=torch.int8)
        >>> octavo.ops.int8_gemm(a, b, torch.tensor([0.5]), torch.tensor([1.0, 2.0]), bias=torch.tensor([0.5, 0.0]))
        tensor([[6., 2.]])
    """
    return torch.ops.octavo.int8_gemm(a, b, a_scale, b_scale, bias, out_dtype)


@_fake("int8_gemm")
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=out_dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    outlier_slot: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    """The LLM.int8() product (arXiv 2208.07339, section 3): int8 for most columns, 16 bit for the outlier columns.

    With O the columns of x where any ``|x| >= threshold``, and ``codes, scale = quantize_rowwise(x[:, ~O])``::

        y = (codes @ weight[:, ~O].T) * scale[:, None] * weight_scale
          + x[:, O] @ (weight[:, O] * weight_scale[:, None]).T + bias

    The outlier part is accumulated in fp32, in the same kernel as the int8 part, which reads the number of outlier
    columns on the device: no host synchronisation and no shape that depends on the data. Products of outliers with int8
    codes are added before `weight_scale` enters: in range for |x| up to about 1e33.

    Args:
        x: [..., k], fp32, fp16 or bf16; k at most 131071.
        weight: int8 [n, k].
        weight_scale: fp32 [n].
        bias: [n], fp32, fp16 or bf16.
        threshold: 0 (every column in int8) or positive; 6.0 in the paper.
        outlier_slot: int32 [k]: for columns whose unquantized weight was kept, the row of `outlier_weight`; else -1.
        outlier_weight: [slots, n], fp32, fp16 or bf16: used instead of the int8 codes where such a column is in O.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, negative or NaN threshold, k too large.

    Example:
        >>> import octavo, torch
        >>> weight, scale = octavo.quantize_rowwise(torch.eye(3, 4))
        >>> x = torch.tensor([[1.0, 50.0, 2.0, 0.0]])
        >>> octavo.ops.int8_linear(x, weight, scale, threshold=6.0).round(decimals=1)
        tensor([[ 1., 50.,  2.]])
    """
    return torch.ops.octavo.int8_linear(x, weight, weight_scale, bias, threshold, outlier_slot, outlier_weight)


@_fake("int8_linear")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    outlier_slot: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
