"""How results are compared: codes and integers by bits, floats against float64 within a stated bound."""

from __future__ import annotations

from typing import Any

import torch
from octavo import reference
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits, where any NaN equals any other."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(nan=0.0, posinf=7e4), expected.nan_to_num(nan=0.0, posinf=7e4)
    wrong = (actual != expected).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} elements differ, the first at {wrong[0].tolist()}"


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """|actual - expected| <= the rounding of `terms` fp32 operations on sums of `magnitude`, plus that of the result.

    `magnitude` is the sum of the absolute values of what is added up; it bounds every partial sum.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    bound = magnitude * terms * 2.0**-24 + expected.abs() * torch.finfo(actual.dtype).eps / 2 * 1.001
    bound = bound + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected).abs()
    worst = (error - bound).nan_to_num(nan=-1.0)
    assert bool((worst <= 0).all()), (
        f"error {error.flatten()[worst.argmax()]:.3g} over {bound.flatten()[worst.argmax()]:.3g}"
    )


def special_rows(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random rows of very different scale, then, as far as there are rows, those that hide bugs."""
    x = torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    x = x.to(dtype)
    finite = torch.finfo(dtype)
    fill = [
        lambda r: r.zero_(),
        lambda r: r[cols // 2 :].fill_(torch.nan),
        lambda r: r[:1].fill_(torch.inf),
        lambda r: r.fill_(-torch.inf),
        lambda r: r.mul_(0).add_(finite.smallest_normal * 2.0**-3),  # denormals
        lambda r: r.fill_(finite.max),
        lambda r: r.copy_(torch.arange(cols) % 255 - 127.0).mul_(0.5),  # midpoints between codes
        lambda r: r.fill_(-0.0),
        lambda r: r.fill_(2.0**-121 if dtype != torch.float16 else 2.0**-24),  # 127 / absmax leaves fp32
    ]
    for i, change in enumerate(fill):
        if 2 * i + 1 < rows:
            change(x[2 * i + 1])
    return x


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits, the sign of zeros included; any NaN equals any other."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (t.masked_fill(t.isnan(), 0.0) for t in (actual, expected))
        integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
        actual, expected = actual.contiguous().view(integer), expected.contiguous().view(integer)
    wrong = (actual != expected).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} elements differ, the first at {wrong[0].tolist()}"


def assert_scheme(ops: Any, scheme: str, x: Tensor, finite: bool) -> None:
    """An operator of int8 quantization against the reference, to the bit; finite: without NaN and Inf."""
    if finite:
        x = x.nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0)
    for actual, expected in zip(getattr(ops, scheme)(x), getattr(reference, scheme)(x), strict=True):
        assert_same(actual, expected)
