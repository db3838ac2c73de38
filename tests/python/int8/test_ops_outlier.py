"""Finding and extracting outlier columns, on every backend."""

from __future__ import annotations

import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_same, special_rows
from octavo import reference
from octavo.bench.cases import QUANTIZE_TEST_SHAPES


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [1e-3, 1.5, 50.0, float("inf")])
@pytest.mark.parametrize("shape", QUANTIZE_TEST_SHAPES, ids=str)
def test_find(ops: Ops, shape: tuple[int, int], threshold: float, dtype: torch.dtype, generator: torch.Generator):
    x = special_rows(*shape, dtype, generator)
    columns, count = ops.find_outlier_columns(x, threshold)
    expected_columns, expected_count = reference.find_outlier_columns(x, threshold)
    assert_same(count, expected_count)
    assert_same(columns, expected_columns)


def test_all_none_and_exactly_the_threshold(ops: Ops):
    x = torch.zeros(3, 5000)
    assert ops.find_outlier_columns(x, 6.0)[1].item() == 0
    x[1, 17], x[2, 4999] = 6.0, -6.0
    columns, count = ops.find_outlier_columns(x, 6.0)
    assert count.item() == 2 and columns[:3].tolist() == [17, 4999, -1]
    x[0] = 7.0
    columns, count = ops.find_outlier_columns(x, 6.0)
    assert count.item() == 5000 and torch.equal(columns, torch.arange(5000, dtype=torch.int32))


@pytest.mark.parametrize("threshold", [1e-46, 1e-300, 1e-45])
def test_thresholds_below_fp32(ops: Ops, threshold: float):
    """A positive threshold stays positive: zeros are no outliers."""
    x = torch.tensor([[0.0, 1e-45, -0.0, 1.0]])
    columns, count = ops.find_outlier_columns(x, threshold)
    assert count.item() == 2 and columns.tolist() == [1, 3, -1, -1]
    for actual, expected in zip((columns, count), reference.find_outlier_columns(x, threshold), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (7,), (2, 3, 9)], ids=str)
def test_any_rank_and_empty(ops: Ops, shape: tuple[int, ...]):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    for actual, expected in zip(ops.find_outlier_columns(x, 5.0), reference.find_outlier_columns(x, 5.0), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("capacity", [0, 1, 5, 70])
def test_extract(ops: Ops, capacity: int, dtype: torch.dtype, generator: torch.Generator):
    x = torch.randn(2, 11, 70, generator=generator).to(dtype)
    columns, count = reference.find_outlier_columns(x, 2.5)
    columns = columns[:capacity]
    assert_same(ops.extract_columns(x, columns, count), reference.extract_columns(x, columns, count))
    weight, scale = reference.quantize_rowwise(torch.randn(13, 70, generator=generator))
    assert_same(
        ops.extract_int8_columns(weight, scale, columns, count, dtype),
        reference.extract_int8_columns(weight, scale, columns, count, dtype),
    )


def test_ids_outside_the_matrix_give_zeros(ops: Ops):
    columns = torch.tensor([1, -1, 99, 0], dtype=torch.int32)
    out = ops.extract_columns(torch.tensor([[1.0, 2.0]]), columns, torch.tensor([4], dtype=torch.int32))
    assert out.tolist() == [[2.0, 0.0, 0.0, 1.0]]


def test_pieces_make_the_outlier_product(ops: Ops, generator: torch.Generator):
    x = torch.randn(9, 64, generator=generator)
    x[:, 20] *= 20
    weight, scale = reference.quantize_rowwise(torch.randn(17, 64, generator=generator))
    columns, count = ops.find_outlier_columns(x, 6.0)
    part = ops.extract_columns(x, columns, count).double() @ (
        ops.extract_int8_columns(weight, scale, columns, count, torch.float32).double().T
    )
    whole = reference.int8_linear(x, weight, scale, None, 6.0)
    codes, row_scale = reference.quantize_rowwise(x.index_fill(1, columns[: int(count)].long(), 0.0))
    torch.testing.assert_close(part + reference.int8_gemm(codes, weight, row_scale, scale), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.find_outlier_columns(torch.ones(2, 2), 0.0), "threshold must be positive, got 0"),
        (lambda o: o.find_outlier_columns(torch.ones(2, 2), float("nan")), "got nan"),
        (lambda o: o.find_outlier_columns(torch.ones(2, 2, dtype=torch.int8), 1.0), "got int8"),
        (
            lambda o: o.extract_columns(torch.ones(2, 2), torch.zeros(2), torch.zeros(1, dtype=torch.int32)),
            "columns must be int32, got float32",
        ),
        (
            lambda o: o.extract_columns(
                torch.ones(2, 2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
            ),
            r"count must have shape \[1\] .* got \[2\]",
        ),
    ],
)
def test_errors_name_the_values(ops: Ops, call, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)
