"""The operators of 8-bit blocks: one thin function per op, its fake right below it; see :mod:`octavo.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.fakes import fake as _fake


def quantize_blockwise(
    x: Tensor, blocksize: int = 256, signed: bool = True, code: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize blocks of consecutive elements to 8 bits, each by its own absmax (arXiv 2110.02861, section 2).

    With block b the elements ``[b * blocksize, (b + 1) * blocksize)`` of the flattened x (the last may be shorter)::

        absmax[b] = max |x[i]|  over the finite elements of the block
        codes[i] = the code whose value is nearest to x[i] * (1 / absmax[b]), in fp32; of two, the lower

    The codes are those of the dynamic map of section 2.1, `octavo.reference.dynamic_map`: seven decades of equal
    cells, signed with 127 as the code of 0, unsigned with 0. NaN has the code of 0, +-Inf the outermost code of its
    sign; neither changes the rest of its block. A block whose absmax is below 2**-126 is all the code of 0, its absmax
    stored as 0.

    Args:
        x: any shape, fp32, fp16 or bf16.
        blocksize: a power of two from 64 to 4096.
        signed: which dynamic map.
        code: fp32 [256], finite and ascending: a code book to use instead; its value nearest to 0 then stands for 0.

    Returns:
        codes uint8 of x's shape and absmax fp32 [ceil(numel / blocksize)].

    Raises:
        RuntimeError: wrong dtype, device or blocksize, a code book of another shape or (on the CPU) order.

    Example:
        >>> import octavo, torch
        >>> codes, absmax = octavo.quantize_blockwise(torch.tensor([0.0, 2.0, -2.0, 1.0]))
        >>> codes, absmax
        (tensor([127, 255,   0, 219], dtype=torch.uint8), tensor([2.]))
    """
    return torch.ops.octavo.quantize_blockwise(x, blocksize, signed, code)


@_fake("quantize_blockwise")
def _(x: Tensor, blocksize: int = 256, signed: bool = True, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + blocksize - 1) // blocksize
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((blocks,), dtype=torch.float32)


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 256,
    signed: bool = True,
    code: Tensor | None = None,
) -> Tensor:
    """``value[codes[i]] * absmax[i // blocksize]``, computed in fp32 and rounded once to `dtype`.

    Args:
        codes: uint8, any shape.
        absmax: fp32 [ceil(numel / blocksize)].
        dtype: of the result: fp32, fp16 or bf16.
        blocksize, signed, code: as for `quantize_blockwise`.

    Example:
        >>> import octavo, torch
        >>> codes, absmax = octavo.quantize_blockwise(torch.linspace(-1, 1, 512))
        >>> x = octavo.dequantize_blockwise(codes, absmax)
        >>> bool((x - torch.linspace(-1, 1, 512)).abs().max() < 0.01)
        True
    """
    return torch.ops.octavo.dequantize_blockwise(codes, absmax, dtype, blocksize, signed, code)


@_fake("dequantize_blockwise")
def _(
    codes: Tensor,
    absmax: Tensor,
    dtype: torch.dtype,
    blocksize: int = 256,
    signed: bool = True,
    code: Tensor | None = None,
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
