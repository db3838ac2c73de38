"""The hash that stands for random numbers: csrc/common/random.h."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

_Bits = TypeVar("_Bits", Tensor, int)


def mix_bits(x: _Bits) -> _Bits:
    """32 bits of the hash that makes random numbers, in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
