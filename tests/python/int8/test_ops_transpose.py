"""int8 quantization that also transposes: bits against the reference, on every backend."""

from __future__ import annotations

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_same, assert_scheme, special_rows
from octavo import reference
from octavo.bench.cases import QUANTIZE_TEST_SHAPES

SCHEMES = ("quantize_tensorwise_transpose", "quantize_columnwise_transpose", "quantize_rowwise_columnwise_transpose")
# Tiles are 128 x 64: whole ones, less and one more in either direction.
SHAPES = (*QUANTIZE_TEST_SHAPES, (128, 64), (127, 72), (129, 65), (256, 200), (144, 8), (16, 136))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("finite", [True, False])
def test_schemes(
    ops: Ops, scheme: str, shape: tuple[int, int], finite: bool, dtype: torch.dtype, generator: torch.Generator
):
    assert_scheme(ops, scheme, special_rows(*shape, dtype, generator), finite)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("shape", [(5, 3), (130, 70), (128, 64)], ids=str)
@pytest.mark.parametrize("seed", [0, 12345678901234, -3])
def test_rounding_at_random(
    ops: Ops, scheme: str, shape: tuple[int, int], seed: int, dtype: torch.dtype, generator: torch.Generator
):
    x = special_rows(*shape, dtype, generator)
    number = torch.tensor([seed])
    for actual, expected in zip(getattr(ops, scheme)(x, number), getattr(reference, scheme)(x, number), strict=True):
        assert_same(actual, expected)


def test_rounding_at_random_is_right_in_the_mean(ops: Ops, generator: torch.Generator):
    x = torch.randn(64, 48, generator=generator)
    x[0] = 4.5  # the absmax, which has a code of its own
    draws = [ops.quantize_columnwise_transpose(x, torch.tensor(seed)) for seed in range(400)]
    values = torch.stack([codes.float() * scale[:, None] for codes, scale in draws])
    scale = draws[0][1]
    assert (values[:, :, 0] - 4.5).abs().max() < 1e-5
    assert bool(((values - x.t()).abs() <= scale[:, None] * 1.00001).all())
    # The mean of 400 draws has at most a deviation of 0.5 / 20 of a code; nearest codes are up to 0.5 off.
    off = (values.mean(0) - x.t()) / scale[:, None]
    assert off.abs().max() < 6 * 0.5 / 20
    assert off.abs().mean() < 0.05
    assert len({codes.numpy().tobytes() for codes, _ in draws}) == 400


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (7,), (2, 3, 20)], ids=str)
def test_other_ranks_and_empty_ones(ops: Ops, scheme: str, shape: tuple[int, ...], generator: torch.Generator):
    x = torch.randn(shape, generator=generator)
    for actual, expected in zip(getattr(ops, scheme)(x), getattr(reference, scheme)(x), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_views(ops: Ops, scheme: str, generator: torch.Generator):
    x = torch.randn(130, 150, generator=generator).to(torch.bfloat16)
    for view in (x.t(), x[1:, 3:131], x[::2, ::3], x[:, :1].expand(130, 70)):
        for actual, expected in zip(getattr(ops, scheme)(view), getattr(reference, scheme)(view), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_name_the_values(ops: Ops, scheme: str):
    call = getattr(ops, scheme)
    with pytest.raises(RuntimeError, match=f"{scheme}: x must be float32, float16 or bfloat16, got int64"):
        call(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match=f"{scheme}: x must have at least 1 dimension, got a scalar"):
        call(torch.tensor(1.0))
    if scheme == "quantize_tensorwise_transpose":
        return
    with pytest.raises(RuntimeError, match=f"{scheme}: seed must be int64, got float32"):
        call(torch.ones(3, 3), torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match=r"seed must be one number, got shape \[2\]"):
        call(torch.ones(3, 3), torch.tensor([1, 2]))


def test_the_transpose_is_what_the_other_operators_give(generator: torch.Generator):
    x = torch.randn(33, 200, generator=generator)
    codes, transposed, scale = octavo.ops.quantize_tensorwise_transpose(x)
    assert torch.equal(transposed, codes.t())
    for ours, theirs in zip((codes, scale), octavo.ops.quantize_tensorwise(x), strict=True):
        assert torch.equal(ours, theirs)
    transposed, scale = octavo.ops.quantize_columnwise_transpose(x)
    codes, column_scale = octavo.ops.quantize_columnwise(x)
    assert torch.equal(transposed, codes.t()) and torch.equal(scale, column_scale)
