"""The operators on low-bit block-wise quantized tensors: see :mod:`octavo.ops`, which exports them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.fakes import fake

# quant_type: "nf4" and "fp4" as published with QLoRA (arXiv 2305.14314), "nf2", "nf3", "nf8" by NF4's definition.
BITS = {"nf2": 2, "nf3": 3, "nf4": 4, "nf8": 8, "fp4": 4}


def packed_bytes(count: int, quant_type: str) -> int:
    """Bytes of the packed codes of `count` elements."""
    return -(-count * BITS[quant_type] // 8)


def nf4_quantize(x: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize x in blocks of its flattened elements to the nearest value of a low-bit code book (QLoRA, arXiv
    2305.14314, section 3).

    ``absmax[b] = max |x|`` over block b, ``code[i]`` = how many of the code book's thresholds lie below ``x[i] *
    (1 / absmax[i // blocksize])`` in fp32 (a tie goes down; fp4: of the magnitude, with the sign beside it). The last
    block may be shorter; blocks may cross the rows of x. NF4's and FP4's values and thresholds are the published ones,
    to the bit.

    Packed without gaps, the first code in the upper bits of the first byte; of an odd number of 4-bit codes the last
    half byte is the code of 0. A block of zeros, or whose absmax is below 2**-126, has absmax 0 and the code of 0. NaN
    has the code of 0, Inf the outermost one of its sign; neither counts for the absmax.

    Args:
        x: any shape, fp32, fp16 or bf16.
        quant_type: "nf4", "fp4", "nf2", "nf3" or "nf8".
        blocksize: a power of two from 32 to 4096.

    Returns:
        packed uint8 [ceil(numel * bits / 8)] and absmax fp32 [ceil(numel / blocksize)].

    Raises:
        RuntimeError: wrong dtype, an unknown quant_type, a blocksize that is not supported.

    Example:
        >>> import octavo, torch
        >>> packed, absmax = octavo.ops.nf4_quantize(torch.eye(8, 64))
        >>> packed.shape, packed.dtype, absmax.shape
        (torch.Size([256]), torch.uint8, torch.Size([8]))
    """
    return torch.ops.octavo.nf4_quantize(x, quant_type, blocksize)


@fake("nf4_quantize")
def _(x: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    count = x.numel()
    packed = x.new_empty((packed_bytes(count, quant_type),), dtype=torch.uint8)
    return packed, x.new_empty((-(-count // blocksize),), dtype=torch.float32)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    size: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    """``value[code[i]] * absmax[i // blocksize]`` in fp32, rounded once to `dtype`: what `nf4_quantize` packed.

    With double quantization (section 3 of arXiv 2305.14314) absmax is itself 8-bit codes of the signed dynamic map, in
    blocks of 256: ``absmax[b] = dynamic[absmax_code[b]] * nested_absmax[b // 256] + offset``.

    Args:
        packed: uint8 [ceil(numel * bits / 8)].
        absmax: fp32 [ceil(numel / blocksize)]; uint8 with nested_absmax.
        nested_absmax: fp32 [ceil(blocks / 256)], or None.
        offset: fp32 [1] beside nested_absmax, or None.
        size: of the result.
        dtype: fp32, fp16 or bf16.
        quant_type, blocksize: as for `nf4_quantize`.

    Returns:
        [*size], `dtype`.

    Raises:
        RuntimeError: mismatched lengths, dtypes or devices, an unknown quant_type or blocksize.

    Example:
        >>> import octavo, torch
        >>> x = torch.eye(8, 64)
        >>> packed, absmax = octavo.ops.nf4_quantize(x)
        >>> torch.equal(octavo.ops.nf4_dequantize(packed, absmax, None, None, [8, 64], torch.float32), x)
        True
    """
    return torch.ops.octavo.nf4_dequantize(
        packed, absmax, nested_absmax, offset, size, dtype, quant_type, blocksize
    )  # fmt: skip


@fake("nf4_dequantize")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    size: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    return packed.new_empty(tuple(size), dtype=dtype)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    """``x @ W.T + bias`` with a weight [n, k] as `nf4_quantize` packs it, dequantized inside the product.

    W is ``nf4_dequantize(packed, absmax, ..., [n, k], float32)``. Accumulated in fp32 and rounded once. With 16-bit x,
    either the values of the code book or the dequantized weights may be rounded to x's dtype first; the whole weight is
    never in memory. A NaN or Inf in a row of x makes that row of y NaN or Inf, and no other.

    Args:
        x: [..., k], fp32, fp16 or bf16.
        packed, absmax, nested_absmax, offset, quant_type, blocksize: as for `nf4_dequantize`.
        bias: [n], fp32, fp16 or bf16, or None.
        n: output features.

    Returns:
        [..., n], x's dtype.

    Raises:
        RuntimeError: mismatched lengths, dtypes or devices, an unknown quant_type or blocksize.

    Example:
        >>> import octavo, torch
        >>> packed, absmax = octavo.ops.nf4_quantize(torch.eye(8, 64))
        >>> octavo.ops.nf4_linear(torch.ones(1, 64), packed, absmax, None, None, None, n=8)
        tensor([[1., 1., 1., 1., 1., 1., 1., 1.]])
    """
    return torch.ops.octavo.nf4_linear(x, packed, absmax, nested_absmax, offset, bias, n, quant_type, blocksize)


@fake("nf4_linear")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def nf4_linear_transposed(
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    k: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    """``g @ W`` with the weight [n, k] of `nf4_linear`: the gradient of its x, without the whole W in memory.

    Args:
        g: [..., n], fp32, fp16 or bf16.
        packed, absmax, nested_absmax, offset, quant_type, blocksize: as for `nf4_dequantize`.
        k: input features of the weight.

    Returns:
        [..., k], g's dtype; sums and rounding as in `nf4_linear`.

    Raises:
        RuntimeError: mismatched lengths, dtypes or devices, an unknown quant_type or blocksize.

    Example:
        >>> import octavo, torch
        >>> packed, absmax = octavo.ops.nf4_quantize(torch.eye(8, 64))
        >>> octavo.ops.nf4_linear_transposed(torch.ones(2, 8), packed, absmax, None, None, k=64).shape
        torch.Size([2, 64])
    """
    return torch.ops.octavo.nf4_linear_transposed(
        g, packed, absmax, nested_absmax, offset, k, quant_type, blocksize
    )  # fmt: skip


@fake("nf4_linear_transposed")
def _(
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    k: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    return g.new_empty((*g.shape[:-1], k))
