"""The operators that quantize to int8 and transpose: see :mod:`octavo.ops`, which exports them.

A product sums along rows of both operands. One that needs x by its columns, as both products of a backward pass do,
takes these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.fakes import fake


def _turned(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[-1], math.prod(x.shape[:-1])), dtype=torch.int8)


def quantize_tensorwise_transpose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`octavo.ops.quantize_tensorwise`, and the transpose of its codes: both operands that SwitchBack needs of a weight
    (arXiv 2304.13013, section 2.2), from one read of x beside that for its absmax.

    Args:
        x: [..., k], fp32, fp16 or bf16.

    Returns:
        codes int8 [..., k], transposed int8 [k, rows] with ``transposed[j, i] = codes.view(rows, k)[i, j]``, and scale
        fp32 [] (0-dimensional).

    Raises:
        RuntimeError: wrong dtype, a 0-dimensional x.

    Example:
        >>> import octavo, torch
        >>> codes, transposed, scale = octavo.ops.quantize_tensorwise_transpose(torch.randn(2, 3))
        >>> transposed.shape, torch.equal(transposed, codes.T)
        (torch.Size([3, 2]), True)
    """
    return torch.ops.octavo.quantize_tensorwise_transpose(x)


@fake("quantize_tensorwise_transpose")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), _turned(x), x.new_empty((), dtype=torch.float32)


def quantize_columnwise_transpose(x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`octavo.ops.quantize_columnwise`, transposed: each column of x by its own absmax, as a row of the result.

    With a seed, codes are rounded at random: ``floor(x * (127 / absmax) + u)``, saturated at +-127, with u uniform in
    [0, 1), a hash of the seed and the element's row and column, the same on every machine. The mean over seeds is
    then x: an error that does not add up over a sum of many products.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        seed: int64, one element, on x's device, or None: to nearest, of two to even.

    Returns:
        transposed int8 [k, rows] and scale fp32 [k].

    Raises:
        RuntimeError: wrong dtype, a 0-dimensional x, a seed of another dtype, size or device.

    Example:
        >>> import octavo, torch
        >>> x = torch.randn(4, 3)
        >>> transposed, scale = octavo.ops.quantize_columnwise_transpose(x)
        >>> torch.equal(transposed, octavo.ops.quantize_columnwise(x)[0].T)
        True
        >>> octavo.ops.quantize_columnwise_transpose(x, seed=torch.tensor([1]))[0].shape
        torch.Size([3, 4])
    """
    return torch.ops.octavo.quantize_columnwise_transpose(x, seed)


@fake("quantize_columnwise_transpose")
def _(x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _turned(x), x.new_empty(x.shape[-1:], dtype=torch.float32)


def quantize_rowwise_columnwise_transpose(
    x: Tensor, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`octavo.ops.quantize_rowwise` and `quantize_columnwise_transpose` together: one read of x gives the row codes and
    both absmax, a second one the columns' codes.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        seed: of the columns' codes, as there; row codes are rounded to nearest.

    Returns:
        row codes int8 [..., k], row scale fp32 [...], transposed int8 [k, rows], column scale fp32 [k].

    Example:
        >>> import octavo, torch
        >>> x = torch.randn(4, 3)
        >>> codes, row_scale, transposed, column_scale = octavo.ops.quantize_rowwise_columnwise_transpose(x)
        >>> codes.shape, transposed.shape
        (torch.Size([4, 3]), torch.Size([3, 4]))
        >>> torch.equal(codes, octavo.quantize_rowwise(x)[0])
        True
    """
    return torch.ops.octavo.quantize_rowwise_columnwise_transpose(x, seed)


@fake("quantize_rowwise_columnwise_transpose")
def _(x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, row_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    return codes, row_scale, _turned(x), x.new_empty(x.shape[-1:], dtype=torch.float32)
