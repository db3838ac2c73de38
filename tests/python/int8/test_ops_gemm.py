"""int8 products and the LLM.int8() linear: integers by bits, floats against float64, on every backend."""

from __future__ import annotations

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_close, assert_same
from octavo import reference
from octavo.bench.cases import EMPTY_GEMM_SHAPES, GEMM_TEST_SHAPES, Shape
from torch import Tensor


def codes(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("shape", (*GEMM_TEST_SHAPES, *EMPTY_GEMM_SHAPES), ids=str)
def test_int8_mm(ops: Ops, shape: Shape, generator: torch.Generator):
    m, n, k = shape
    a, b = codes(m, k, generator=generator), codes(n, k, generator=generator)
    assert_same(ops.int8_mm(a, b), reference.int8_mm(a, b))


def test_int8_mm_at_the_ends_of_the_range(ops: Ops):
    # The largest sums there are: saturating instructions (vpmaddubsw) and a wrong correction show here.
    for k in (1, 63, 64, 65, 1000):
        for a_value, b_value in ((-128, -128), (127, -128), (-128, 127), (127, 127)):
            a = torch.full((7, k), a_value, dtype=torch.int8)
            b = torch.full((9, k), b_value, dtype=torch.int8)
            assert_same(ops.int8_mm(a, b), torch.full((7, 9), a_value * b_value * k, dtype=torch.int32))


def test_largest_k_is_exact_and_the_next_an_error():
    k = 131071
    a = torch.full((1, k), -128, dtype=torch.int8)
    for level in octavo._C.available_isas():
        before = octavo._C.isa()
        octavo._C.set_isa(level)
        assert octavo.ops.int8_mm(a, a).item() == 128 * 128 * k
        octavo._C.set_isa(before)
    a = torch.zeros(1, k + 1, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="k = 131072 is more than 131071"):
        octavo.ops.int8_mm(a, a)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", (*GEMM_TEST_SHAPES, *EMPTY_GEMM_SHAPES), ids=str)
def test_int8_gemm(ops: Ops, shape: Shape, with_bias: bool, dtype: torch.dtype, generator: torch.Generator):
    m, n, k = shape
    a, b = codes(m, k, generator=generator), codes(n, k, generator=generator)
    a_scale, b_scale = torch.rand(m, generator=generator), torch.rand(n, generator=generator) * 1e-2
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    actual = ops.int8_gemm(a, b, a_scale, b_scale, bias, dtype)
    expected = reference.int8_gemm(a, b, a_scale, b_scale, bias)
    magnitude = expected.abs() + (2 * bias.double().abs() if with_bias else 0)
    assert actual.dtype == dtype
    assert_close(actual, expected, magnitude, terms=4)


def test_scales_of_any_size(ops: Ops):
    """Only the product of the scales must be in range."""
    a, b = torch.full((2, 256), 127, dtype=torch.int8), torch.full((3, 256), 127, dtype=torch.int8)
    a_scale, b_scale = torch.tensor([1e33, 1e-30]), torch.tensor([1e-33, 1e-20, 1.0])
    out = ops.int8_gemm(a, b, a_scale, b_scale, None, torch.float32)
    expected = reference.int8_gemm(a, b, a_scale, b_scale)
    assert_close(out[0, :2], expected[0, :2], expected[0, :2].abs(), terms=4)
    assert_close(out[1, 1:], expected[1, 1:], expected[1, 1:].abs(), terms=4)
    for value, threshold in ((3e37, 0.0), (3e33, 6.0)):  # an outlier's products with int8 codes must be in range
        out = ops.int8_linear(torch.full((1, 256), value), b, torch.full((3,), 1e-6), None, threshold)
        expected = torch.full_like(out, value * 127 * 256 * 1e-6).double()
        assert_close(out, expected, expected, terms=260)


def test_one_scale_for_all(ops: Ops, generator: torch.Generator):
    a, b = codes(5, 70, generator=generator), codes(6, 70, generator=generator)
    rows, cols, one = torch.rand(5, generator=generator), torch.rand(6, generator=generator), torch.tensor(0.25)
    for a_scale, b_scale in ((one, cols), (rows, one), (one, one), (one.reshape(1), one.reshape(1))):
        full = ops.int8_gemm(
            a,
            b,
            a_scale.expand(5).contiguous() if a_scale.numel() == 1 else a_scale,
            b_scale.expand(6).contiguous() if b_scale.numel() == 1 else b_scale,
            None,
            torch.float32,
        )
        assert_same(ops.int8_gemm(a, b, a_scale, b_scale, None, torch.float32), full)


def linear_case(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    m, n, k = shape
    x = torch.randn(m, k, generator=generator)
    x[:, k // 2] *= 30  # a systematic outlier column
    if m > 2:
        x[m // 2, k // 3] = 40.0  # a spike in one row only: its column is an outlier for all rows
    weight, scale = reference.quantize_rowwise(torch.randn(n, k, generator=generator))
    return x.to(dtype), weight, scale


def check_linear(ops: Ops, x: Tensor, weight: Tensor, scale: Tensor, *rest: object) -> None:
    """Against float64; the reference shares the codes, so what is left is fp32 accumulation of the epilogue."""
    actual = ops.int8_linear(x, weight, scale, *rest)
    expected = reference.int8_linear(x, weight, scale, *rest)
    assert actual.dtype == x.dtype
    full = weight.double().abs() * scale.double()[:, None]
    kept = rest[3].double().abs().amax() if len(rest) > 3 else 0.0
    magnitude = x.double().abs() @ (full + kept).T
    if rest and rest[0] is not None:
        magnitude = magnitude + rest[0].double().abs()
    outliers = int((x.float().abs() >= rest[1]).reshape(-1, x.shape[-1]).any(0).sum()) if len(rest) > 1 else 0
    assert_close(actual, expected, magnitude, terms=outliers + 6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", GEMM_TEST_SHAPES, ids=str)
def test_int8_linear(ops: Ops, shape: Shape, threshold: float, dtype: torch.dtype, generator: torch.Generator):
    x, weight, scale = linear_case(shape, dtype, generator)
    check_linear(ops, x, weight, scale, torch.randn(shape[1], generator=generator).to(dtype), threshold)


@pytest.mark.parametrize("threshold", [1e-6, 0.8])  # every column an outlier; more than one chunk of them
def test_many_outliers(ops: Ops, threshold: float, generator: torch.Generator):
    x, weight, scale = linear_case((10, 70, 300), torch.float32, generator)
    check_linear(ops, x, weight, scale, None, threshold)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 20])
def test_kept_outlier_weights(ops: Ops, rows: int, dtype: torch.dtype, generator: torch.Generator):
    m, n, k = rows, 33, 130
    x, weight, scale = linear_case((m, n, k), dtype, generator)
    slot = torch.full((k,), -1, dtype=torch.int32)
    slot[[3, k // 2]] = torch.tensor([1, 0], dtype=torch.int32)  # k // 2 is an outlier, 3 is not: its row is not used
    kept = torch.randn(2, n, generator=generator).to(dtype)
    check_linear(ops, x, weight, scale, None, 6.0, slot, kept)
    assert not torch.equal(
        ops.int8_linear(x, weight, scale, None, 6.0, slot, kept), ops.int8_linear(x, weight, scale, None, 6.0)
    )
    plain = ops.int8_linear(x, weight, scale, None, 0.0)
    assert_same(ops.int8_linear(x, weight, scale, None, 0.0, slot, kept), plain)  # no threshold: no outliers


def test_nan_and_inf_stay_in_their_rows(ops: Ops, generator: torch.Generator):
    x, weight, scale = linear_case((6, 40, 96), torch.float32, generator)
    clean = ops.int8_linear(x, weight, scale, None, 0.0)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    dirty = ops.int8_linear(x, weight, scale, None, 0.0)
    assert dirty[[2, 4]].isnan().all()
    assert_same(dirty[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
    # As an outlier, Inf goes through the 16-bit product like in F.linear: Inf or NaN in its row, by the weight.
    dirty = ops.int8_linear(x, weight, scale, None, 6.0)
    assert dirty[2].isnan().all()
    expected = float("inf") * weight[:, 7].float()
    assert_same(dirty[4].sign().nan_to_num(), expected.sign().nan_to_num())
    assert dirty[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (2, 0, 5), (1, 1, 1, 5)], ids=str)
def test_leading_dimensions(ops: Ops, shape: tuple[int, ...], generator: torch.Generator):
    x = torch.randn(shape, generator=generator)
    weight, scale = reference.quantize_rowwise(torch.randn(7, 5, generator=generator))
    for threshold in (0.0, 1.0):
        out = ops.int8_linear(x, weight, scale, None, threshold)
        assert out.shape == (*shape[:-1], 7)
        assert_same(out.reshape(-1, 7), ops.int8_linear(x.reshape(-1, 5), weight, scale, None, threshold))


def test_no_columns_leaves_the_bias(ops: Ops):
    out = ops.int8_linear(
        torch.ones(3, 0), torch.empty(2, 0, dtype=torch.int8), torch.ones(2), torch.tensor([1.0, 2.0]), 6.0
    )
    assert out.tolist() == [[1.0, 2.0]] * 3


def test_views_and_unaligned(ops: Ops, generator: torch.Generator):
    base, weight_base = torch.randn(40, 130, generator=generator), codes(20, 130, generator=generator)
    scale = torch.rand(20, generator=generator)
    for x, weight in ((base[:, 1:], weight_base[:, 1:]), (base[::2], weight_base), (base[:, ::2], weight_base[:, ::2])):
        assert_same(
            ops.int8_linear(x, weight, scale, None, 2.0),
            ops.int8_linear(x.contiguous(), weight.contiguous(), scale, None, 2.0),
        )
    flat = codes(20 * 43 + 1, generator=generator)[1:].view(20, 43)  # contiguous, but at an odd address
    a = codes(9 * 43 + 3, generator=generator)[3:].view(9, 43)
    assert_same(ops.int8_mm(a, flat), reference.int8_mm(a, flat))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [3, 21, 150])
def test_backends_agree_to_the_bit(ops: Ops, rows: int, dtype: torch.dtype, generator: torch.Generator):
    """The float parts too: one definition, the same order of operations."""
    if ops.backend == "cuda" and dtype is not torch.float32:
        pytest.skip("tensor cores add the products of 16-bit outliers in groups: test_int8_linear has the bound")
    x, weight, scale = linear_case((rows, 37, 208), dtype, generator)
    bias = torch.randn(37, generator=generator)
    before = octavo._C.isa()
    octavo._C.set_isa("portable")
    expected = octavo.ops.int8_linear(x, weight, scale, bias, 2.0)
    octavo._C.set_isa(before)
    assert_same(ops.int8_linear(x, weight, scale, bias, 2.0), expected)


F32, ONES = torch.float32, torch.ones


def i8(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


def i32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.int8_mm(i8(2, 3), i8(2, 4)), "k = 3 but b .* k = 4"),
        (lambda o: o.int8_mm(ONES(2, 3), i8(2, 3)), "a must be int8, got float32"),
        (lambda o: o.int8_mm(i8(2, 3), i8(3)), r"2 dimensions, got shape \[3\]"),
        (
            lambda o: o.int8_gemm(i8(2, 3), i8(4, 3), ONES(3), ONES(4), None, F32),
            r"a_scale must have shape \[2\] or one element, got \[3\]",
        ),
        (
            lambda o: o.int8_gemm(i8(2, 3), i8(4, 3), ONES(2), ONES(4).double(), None, F32),
            "b_scale must be float32, got float64",
        ),
        (
            lambda o: o.int8_gemm(i8(2, 3), i8(4, 3), ONES(2), ONES(4), None, torch.int32),
            "out_dtype must be .* got int32",
        ),
        (
            lambda o: o.int8_linear(ONES(2, 3), i8(4, 3), ONES(4), ONES(5), 6.0),
            r"bias must have shape \[4\] .* got \[5\]",
        ),
        (
            lambda o: o.int8_linear(ONES(2, 3), i8(4, 3), ONES(1)),
            r"weight_scale must have shape \[4\], got \[1\]",
        ),
        (
            lambda o: o.int8_linear(ONES(2, 3), ONES(4, 3), ONES(4)),
            "weight must be int8, got float32",
        ),
        (
            lambda o: o.int8_linear(ONES(2, 3).double(), i8(4, 3), ONES(4)),
            "x must be .* got float64",
        ),
        (
            lambda o: o.int8_linear(ONES(2, 3), i8(4, 3), ONES(4), None, -2.0),
            "threshold .* got -2",
        ),
        (
            lambda o: o.int8_linear(
                ONES(2, 3),
                i8(4, 3),
                ONES(4),
                None,
                6.0,
                i32(3),
            ),
            "go together, got only outlier_slot",
        ),
        (
            lambda o: o.int8_linear(
                ONES(2, 3),
                i8(4, 3),
                ONES(4),
                None,
                6.0,
                i32(2),
                ONES(1, 4),
            ),
            r"outlier_slot must have shape \[3\]",
        ),
    ],
)
def test_errors_name_the_values(ops: Ops, call, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)
