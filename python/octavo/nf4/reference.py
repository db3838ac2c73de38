"""References of the operators on low-bit block-wise quantized tensors, and their code books from the definition."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from ..blockwise.maps import dynamic_map

_BITS = {"nf2": 2, "nf3": 3, "nf4": 4, "nf8": 8, "fp4": 4}
# As published: the quantiles below, with errors of a few units in the last place.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # magnitudes by their bits, times 12
_FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
_OUTERMOST = 0.9677083  # the mean of 1 - 1 / 30 and 1 - 1 / 32


def normal_float(bits: int) -> Tensor:
    """The code book of NormalFloat by its definition (arXiv 2305.14314, section 3), fp32 [2**bits], ascending.

    Quantiles of the normal distribution at 2**(bits - 1) + 1 places spread evenly from 0.9677083 to 0.5 and, negative,
    at 2**(bits - 1) places, all over the largest: 0 is exact, and the ends are -1 and 1.
    """
    normal, half = NormalDist(), 2 ** (bits - 1)

    def places(count: int) -> list[float]:  # without the last, 0.5
        return [_OUTERMOST + (0.5 - _OUTERMOST) * i / (count - 1) for i in range(count - 1)]

    positive = [normal.inv_cdf(p) for p in places(half + 1)]
    values = sorted([0.0, *positive, *(-normal.inv_cdf(p) for p in places(half))])
    return torch.tensor([value / positive[0] for value in values])


@functools.cache
def _code_book(quant_type: str) -> Tensor:
    if quant_type not in _BITS:
        raise RuntimeError(f"quant_type must be one of {', '.join(_BITS)}, got {quant_type!r}")
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    if quant_type == "fp4":
        magnitudes = torch.tensor(_FP4) / 12
        return torch.cat([magnitudes, -magnitudes])
    return normal_float(_BITS[quant_type])


def code_book(quant_type: str) -> Tensor:
    """The values of a code book by their codes, fp32."""
    return _code_book(quant_type).clone()


def _codes(v: Tensor, quant_type: str) -> Tensor:
    """The code of finite fp32 values from [-1, 1] (and a little beyond)."""
    book = _code_book(quant_type)
    if quant_type == "fp4":
        order = book[:8].argsort()
        rank = torch.bucketize(v.abs(), torch.tensor(_FP4_THRESHOLDS))
        return order[rank] + 8 * (v < 0)
    middles = ((book[:-1].double() + book[1:].double()) / 2).float()
    return torch.bucketize(v, middles)


def _pack(codes: Tensor, quant_type: str) -> Tensor:
    bits = _BITS[quant_type]
    if bits == 4 and len(codes) % 2:
        codes = torch.cat([codes, _codes(torch.zeros(1), quant_type)])
    stream = (codes[:, None] >> torch.arange(bits - 1, -1, -1) & 1).flatten()
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).view(-1, 8)
    return (stream << torch.arange(7, -1, -1)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, count: int, quant_type: str) -> Tensor:
    bits = _BITS[quant_type]
    stream = (packed.long()[:, None] >> torch.arange(7, -1, -1) & 1).flatten()[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits - 1, -1, -1)).sum(1)


def nf4_quantize(x: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    flat = x.float().flatten()
    count = len(flat)
    blocks = torch.cat([flat, flat.new_zeros(-count % blocksize)]).view(-1, blocksize)
    absmax = blocks.abs().nan_to_num(0.0, 0.0).amax(1) if count else flat.new_zeros(0)
    absmax = torch.where(absmax < 2.0**-126, 0.0, absmax)
    inverse = torch.where(absmax == 0, 0.0, torch.div(torch.tensor(1.0), absmax))
    v = (blocks * inverse[:, None]).masked_fill(absmax[:, None] == 0, 0.0).nan_to_num(0.0, torch.inf, -torch.inf)
    return _pack(_codes(v.flatten()[:count], quant_type), quant_type), absmax


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
    count = math.prod(size)
    if nested_absmax is not None and offset is not None:
        absmax = dynamic_map(True)[absmax.long()] * nested_absmax.repeat_interleave(256)[: len(absmax)] + offset
    values = _code_book(quant_type)[_unpack(packed, count, quant_type)]
    return (values * absmax.repeat_interleave(blocksize)[:count]).reshape(tuple(size)).to(dtype)


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
    size = (n, x.shape[-1])
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, size, torch.float32, quant_type, blocksize)
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


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
    size = (g.shape[-1], k)
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, size, torch.float32, quant_type, blocksize)
    return (g.double() @ weight.double()).to(g.dtype)
