"""The dynamic maps in plain PyTorch, and how optimizer states are coded by them: `csrc/common/codebook.h`.

States take a shortcut: within a decade a map is linear, so a code's value is ``|x| * step + base`` with the sign of x,
the published one to within 8 units in the last place, and a value's code ``round(|v| * slope + offset + dither)``, each
a fused multiply-add in fp32. The dither is a number from (-0.5, 0.5), other for each element and step: a step may
change a state by less than the distance of two codes, and so such changes count on the average.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


def dynamic_map(signed: bool = True) -> Tensor:
    """The dynamic map of arXiv 2110.02861 (section 2.1): fp32 [256], ascending.

    Decade i of seven, from 1e-6 to 1, is [0.1, 1] in equal cells, the centres of which are values: 2**i of them with
    either sign, or 2**(i + 1) without; then 0 and 1.
    """
    return _dynamic_map(signed).clone()


@functools.cache
def _dynamic_map(signed: bool) -> Tensor:
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        centres = (10 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / 2)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values))


def thresholds(code: Tensor) -> Tensor:
    """Exact midpoints of neighbouring values, in float64: a value's code is the number of them below it."""
    values = code.double()
    return (values[:-1] + values[1:]) / 2


def fma(a: Tensor | float, b: Tensor | float, c: Tensor) -> Tensor:
    """a * b + c of fp32 numbers, rounded once to fp32."""

    def wide(x: Tensor | float) -> Tensor:
        return x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device=c.device)

    product, other = wide(a) * wide(b), wide(c)  # of 24-bit numbers: exact
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    # Round to odd: where float64 had to round, the last bit becomes 1, so that the second rounding cannot err.
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


@dataclass(frozen=True)
class Arithmetic:
    """Constants of one map, by decade (0 to 6; 7 is the value 1), fp32: of values, then of codes, whose decades end at
    powers of ten."""

    step: Tensor
    base: Tensor
    slope: Tensor
    offset: Tensor
    edges: Tensor


@functools.cache
def arithmetic(signed: bool) -> Arithmetic:
    values = dynamic_map(signed)
    step, base, slope, offset = [], [], [], []
    for decade, scale in enumerate((1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
        cells = 2**decade if signed else 2 ** (decade + 1)
        width, first = scale * 0.9 / cells, scale * (0.1 + 0.45 / cells)
        level = cells if signed else cells - 1  # of the decade's first value
        step.append(width / 2 if signed else width)
        base.append(first - width * cells)
        slope.append(1 / width)
        offset.append(level - first / width)
    top = 1 / (1.0 - float(values[254]))
    slope, offset = [*slope, top], [*offset, (128 if signed else 255) - top]
    edges = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, float(values[254])]
    if signed:  # 0 must be level 0
        slope[0], offset[0] = float(torch.tensor(1.0) / values[128]), 0.0
        step[0], base[0] = float(values[128]) / 2, 0.0
        step.append(0.0)
        base.append(1.0)
    else:  # x = 1 (value 0) and x = 256 (value 1) share it
        step.append(float(torch.tensor(1.0) / torch.tensor(255.0)))
        base.append(-step[7])
    return Arithmetic(*(torch.tensor(each, dtype=torch.float64).float() for each in (step, base, slope, offset, edges)))


def state_value(codes: Tensor, signed: bool) -> Tensor:
    """The values of codes, fp32."""
    map_ = arithmetic(signed)
    x = 2.0 * (codes.float() - 127.0) if signed else codes.float() + 1.0
    decade = (x.abs().view(torch.int32) >> 23) & 7
    step, base = map_.step.to(x.device)[decade], map_.base.to(x.device)[decade]
    return torch.copysign(fma(x.abs(), step, base), x)


def state_code(v: Tensor, signed: bool, draw: Tensor) -> Tensor:
    """The code above or below v, the nearer the likelier. Unsigned: 0 stays 0, and what is above it is at least 1."""
    map_ = arithmetic(signed)
    a = v.abs()
    decade = (a[..., None] > map_.edges.to(v.device)).sum(-1)
    slope, offset = map_.slope.to(v.device)[decade], map_.offset.to(v.device)[decade]
    level = (fma(a, slope, offset) + draw).round()
    if not signed:
        return torch.where(v > 0, level.clamp(1, 255), 0.0).to(torch.uint8)
    return (127.0 + torch.copysign(level.abs(), v)).clamp(0, 255).to(torch.uint8)


def dither_key(number: int, step: float, state: int) -> int:
    """The key of the random numbers for one state of a parameter in one step."""
    return (int(step) * 0x91E10DA5 + number * 0x9E3779B9 + state * 0x85EBCA6B) & 0xFFFFFFFF


def dither(key: int, index: Tensor) -> Tensor:
    """The random numbers that a key gives the elements `index` (int64)."""
    random = (key + index * 0xC13FA9A9) & 0xFFFFFFFF
    unit = ((random >> 9) | 0x3F800000).int().view(torch.float32)  # [1, 2)
    scale = 1.0 - 2.0**-10
    return fma(unit, scale, torch.full_like(unit, -1.5 * scale))
