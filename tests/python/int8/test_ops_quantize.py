"""int8 quantization: bits against the reference, on every backend."""

from __future__ import annotations

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_same, assert_scheme, special_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo import reference
from octavo.bench.cases import QUANTIZE_TEST_SHAPES

SCHEMES = ("quantize_columnwise", "quantize_tensorwise", "quantize_rowwise_columnwise")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 1.5, float("inf")])
@pytest.mark.parametrize("shape", QUANTIZE_TEST_SHAPES, ids=str)
def test_rowwise(ops: Ops, shape: tuple[int, int], threshold: float, dtype: torch.dtype, generator: torch.Generator):
    x = special_rows(*shape, dtype, generator)
    for actual, expected in zip(
        ops.quantize_rowwise(x, threshold), reference.quantize_rowwise(x, threshold), strict=True
    ):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", QUANTIZE_TEST_SHAPES, ids=str)
@pytest.mark.parametrize("finite", [True, False])
def test_other_schemes(
    ops: Ops, scheme: str, shape: tuple[int, int], finite: bool, dtype: torch.dtype, generator: torch.Generator
):
    assert_scheme(ops, scheme, special_rows(*shape, dtype, generator), finite)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_go_to_even(ops: Ops, dtype: torch.dtype):
    # absmax 127 makes the codes the rounded values themselves.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, 64.5, -126.5]]).to(dtype)
    codes, scale = ops.quantize_rowwise(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64, 64, -126]]
    assert scale.tolist() == [1.0]


def test_special_values_have_one_meaning(ops: Ops):
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-121
    x = torch.tensor([[0.0, 0.0], [nan, 1.0], [inf, 1.0], [tiny, -tiny], [1.0, -0.5]])
    codes, scale = ops.quantize_rowwise(x)
    assert codes.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [127, -64]]  # -63.5 rounds to even
    assert scale[0] == 0 and scale[1].isnan() and scale[2].isnan() and scale[3] == 0 and scale[4] == 1 / 127.0
    # With a threshold, Inf is an outlier: left out like any other, and the row stays finite. NaN is not.
    codes, scale = ops.quantize_rowwise(x, 6.0)
    assert codes[2].tolist() == [0, 127] and scale[2] == 1 / 127.0
    assert scale[1].isnan()


def test_bf16_beyond_fp16_survives(ops: Ops):
    x = torch.tensor([[1e6, -2e30], [3e38, 1e38]], dtype=torch.bfloat16)
    codes, scale = ops.quantize_rowwise(x)
    assert scale.isfinite().all()
    assert codes.tolist() == [[0, -127], [127, 42]]


def test_round_trip_is_within_half_a_step(ops: Ops, generator: torch.Generator):
    x = torch.randn(17, 333, generator=generator)
    codes, scale = ops.quantize_rowwise(x)
    error = (ops.dequantize_rowwise(codes, scale, torch.float32) - x).abs()
    assert bool((error <= scale[:, None] * 0.5000001).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4, 7), (3, 64), (2, 3, 130)], ids=str)
def test_dequantize(ops: Ops, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator):
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[:-1], generator=generator) * 1e-2
    scale.view(-1)[0] = torch.nan
    assert_same(ops.dequantize_rowwise(codes, scale, dtype), reference.dequantize_rowwise(codes, scale, dtype))


@pytest.mark.parametrize("shape", [(0,), (5,), (0, 4), (3, 0), (0, 0), (2, 0, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("scheme", ["quantize_rowwise", *SCHEMES])
def test_any_rank_and_empty(ops: Ops, scheme: str, shape: tuple[int, ...]):
    x = torch.ones(shape)
    for actual, expected in zip(getattr(ops, scheme)(x), getattr(reference, scheme)(x), strict=True):
        assert_same(actual, expected)


def test_views_are_read_in_place(ops: Ops, generator: torch.Generator):
    base = torch.randn(20, 66, generator=generator)
    for view in (base.t(), base[::2, 1::3], base[:, 5:], base[3:4].expand(4, 66)):
        assert_same(ops.quantize_rowwise(view)[0], reference.quantize_rowwise(view)[0])
        assert_same(ops.quantize_columnwise(view)[0], reference.quantize_columnwise(view)[0])
    offset = torch.randn(130, generator=generator).bfloat16()[1:].view(3, 43)  # no 16-byte alignment
    assert_same(ops.quantize_rowwise(offset)[0], reference.quantize_rowwise(offset)[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=70),
    threshold=st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32)),
)
def test_any_floats(values: list[float], threshold: float):
    x = torch.tensor([values])
    for level in octavo._C.available_isas():
        before = octavo._C.isa()
        octavo._C.set_isa(level)
        try:
            for actual, expected in zip(
                octavo.quantize_rowwise(x, threshold), reference.quantize_rowwise(x, threshold), strict=True
            ):
                assert_same(actual, expected)
        finally:
            octavo._C.set_isa(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.quantize_rowwise(torch.ones(2, 2, dtype=torch.int32), 0.0), "got int32"),
        (lambda o: o.quantize_rowwise(torch.ones(2, 2, dtype=torch.float64), 0.0), "got float64"),
        (lambda o: o.quantize_rowwise(torch.tensor(1.0), 0.0), "at least 1 dimension"),
        (lambda o: o.quantize_rowwise(torch.ones(2, 2), -1.0), "threshold .* got -1"),
        (lambda o: o.quantize_rowwise(torch.ones(2, 2), float("nan")), "threshold .* got nan"),
        (lambda o: o.quantize_columnwise(torch.tensor(1.0)), "at least 1 dimension"),
        (lambda o: o.quantize_tensorwise(torch.ones(2, dtype=torch.bool)), "got bool"),
        (
            lambda o: o.dequantize_rowwise(torch.ones(2, 3, dtype=torch.int8), torch.ones(3), torch.float32),
            r"shape \[2, 3\] need a scale per row, got scale of shape \[3\]",
        ),
        (
            lambda o: o.dequantize_rowwise(torch.ones(2, 3, dtype=torch.int8), torch.ones(2), torch.int8),
            "dtype must be .* got int8",
        ),
    ],
)
def test_errors_name_the_values(ops: Ops, call, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)
