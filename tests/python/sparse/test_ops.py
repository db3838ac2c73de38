"""Sparse matrices in compressed rows: products, gradients, making and checking them, on every backend."""

from __future__ import annotations

import math

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_close
from octavo import reference
from octavo.bench.cases import CSR_TEST_SHAPES
from torch import Tensor

Csr = tuple[Tensor, Tensor, Tensor]


def sparse(n: int, k: int, density: float, kind: str, generator: torch.Generator) -> Tensor:
    """A dense matrix with the zeros of a kind of structure."""
    dense = torch.randn(n, k, generator=generator)
    picked = torch.rand(n, k, generator=generator) < density
    if kind == "columns":
        picked[:] = torch.rand(k, generator=generator) < density
    elif kind == "rows":
        picked[:] = (torch.rand(n, generator=generator) < density)[:, None]
    elif kind == "stripes":  # heads: some rows have whole spans
        picked[::3, k // 4 : k // 2] = True
    elif kind == "one row":
        picked[:] = False
        picked[n // 2] = True
    return dense * picked


def as_dtypes(csr: Csr, values: torch.dtype, columns: torch.dtype, offsets: torch.dtype) -> Csr:
    return csr[0].to(values), csr[1].to(torch.int32).to(columns), csr[2].to(offsets)


def check(actual: Tensor, expected: Tensor, magnitude: Tensor, length: int, dense: Tensor | None = None) -> None:
    """Within the bound of fp32 sums; and, all in all, at most twice as far off as a dense product in PyTorch."""
    assert_close(actual, expected, magnitude, length + 4)
    if dense is not None and actual.numel() >= 1000:
        assert dense.dtype == actual.dtype
        error, theirs = (actual.double() - expected).norm(), (dense.double() - expected).norm()
        assert error <= 2 * theirs, (error, theirs)


KINDS = ("scattered", "columns", "rows", "stripes", "one row")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", CSR_TEST_SHAPES, ids=str)
def test_matmul(ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator):
    m, n, k = shape
    for i, kind in enumerate(KINDS):
        dense = sparse(n, k, 0.1, kind, generator)
        values_dtype, columns = FLOATS[(i + FLOATS.index(dtype)) % 3], (torch.uint16, torch.int32)[i % 2]
        csr = as_dtypes(octavo.sparse.dense_to_csr(dense), values_dtype, columns, (torch.int32, torch.int64)[i % 2])
        x = torch.randn(m, k, generator=generator).to(dtype)
        bias = torch.randn(n, generator=generator).to(values_dtype) if i % 2 else None
        weight = dense.to(values_dtype)
        actual = ops.csr_matmul(*csr, x, n, bias)
        assert actual.dtype == dtype
        magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
        same = values_dtype == dtype and bias is None
        theirs = torch.nn.functional.linear(x, weight) if same else None
        check(actual, reference.csr_matmul(*csr, x, n, bias), magnitude, k, theirs)


@pytest.mark.parametrize("m", [1, 2, 16, 17, 40])
def test_rows_that_several_tasks_share(ops: Ops, m: int, generator: torch.Generator):
    """Rows longer than any chunk, alone, first, last and next to each other; and thousands of empty ones."""
    n, k = 2600, 9000
    lengths = {0: 5000, 1: 9000, 2: 3, 1300: 9000, 2598: 4100, 2599: 1}
    counts = torch.tensor([lengths.get(i, 0) for i in range(n)])
    columns = torch.cat([torch.randperm(k, generator=generator)[:c].sort().values for c in counts.tolist()])
    values = torch.randn(len(columns), generator=generator)
    csr = (values, columns.int().to(torch.uint16), torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    x = torch.randn(m, k, generator=generator)
    absolute = reference.csr_matmul(csr[0].abs(), *csr[1:], x.abs(), n)
    check(ops.csr_matmul(*csr, x, n), reference.csr_matmul(*csr, x, n), absolute, k)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("columns_dtype", [torch.uint16, torch.int32])
def test_long_rows_among_short_ones(ops: Ops, m: int, columns_dtype: torch.dtype, generator: torch.Generator):
    n, k = 500, 300
    counts = torch.randint(0, 9, (n,), generator=generator)
    counts[[3, 64, 65, 300, 499]] = torch.tensor([63, 64, 65, 300, 200])
    columns = torch.cat([torch.randperm(k, generator=generator)[:c].sort().values for c in counts.tolist()])
    values = torch.randn(len(columns), generator=generator)
    csr = (values, columns.int().to(columns_dtype), torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int())
    x = torch.randn(m, k, generator=generator)
    absolute = reference.csr_matmul(csr[0].abs(), *csr[1:], x.abs(), n)
    check(ops.csr_matmul(*csr, x, n), reference.csr_matmul(*csr, x, n), absolute, k)


@pytest.mark.parametrize("m", [0, 1, 5, 30])
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0), (5, 9)], ids=str)
def test_empty(ops: Ops, shape: tuple[int, int], m: int):
    n, k = shape
    csr = octavo.sparse.dense_to_csr(torch.zeros(n, k))
    x, bias = torch.randn(m, k), torch.randn(n)
    assert torch.equal(ops.csr_matmul(*csr, x, n, bias), bias.expand(m, n))
    assert torch.equal(ops.csr_matmul(*csr, x, n), torch.zeros(m, n))
    assert torch.equal(ops.csr_matmul_transposed(*csr, torch.randn(m, n), k), torch.zeros(m, k))
    assert ops.csr_grad_values(*csr[1:], torch.randn(m, n), x, torch.float32).shape == (0,)
    if n and k:
        csr = octavo.sparse.dense_to_csr(torch.ones(n, k))
        assert torch.equal(
            ops.csr_grad_values(*csr[1:], torch.ones(m, n), torch.ones(m, k), torch.float32), torch.full((n * k,), m)
        )


def test_any_rank_and_views(ops: Ops, generator: torch.Generator):
    dense = sparse(13, 40, 0.3, "scattered", generator)
    csr = octavo.sparse.dense_to_csr(dense)
    strided = (csr[0].repeat_interleave(2)[::2], csr[1].to(torch.int32).repeat_interleave(2)[::2], csr[2])
    x = torch.randn(40, 3, 2, generator=generator).permute(2, 1, 0)
    expected = ops.csr_matmul(*csr, x.contiguous(), 13)
    assert expected.shape == (2, 3, 13)
    assert torch.equal(ops.csr_matmul(*strided, x, 13), expected)
    alone = ops.csr_matmul(*csr, x[0, 0], 13)
    assert alone.shape == (13,)
    torch.testing.assert_close(alone, expected[0, 0], rtol=1e-5, atol=1e-5)
    g = torch.randn(13, 3, 2, generator=generator).permute(2, 1, 0)
    back = ops.csr_matmul_transposed(*csr, g, 40)
    assert back.shape == (2, 3, 40)
    assert torch.equal(ops.csr_matmul_transposed(*csr, g.contiguous(), 40), back)
    grads = ops.csr_grad_values(*csr[1:], g, x, torch.float32)
    assert torch.equal(ops.csr_grad_values(*csr[1:], g.contiguous(), x.contiguous(), torch.float32), grads)


@pytest.mark.parametrize("m", [1, 4, 33])
def test_equal_columns_add_up_and_special_values_stay_where_they_are(ops: Ops, m: int):
    values = torch.tensor([1.0, 2.0, 4.0, torch.inf, 1.0])
    columns = torch.tensor([1, 1, 2, 0, 2], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 4, 5], dtype=torch.int32)
    x = torch.tensor([3.0, 5.0, 7.0, torch.nan]).repeat(m, 1)
    out = ops.csr_matmul(values, columns, offsets, x, 4)
    assert torch.equal(out, torch.tensor([43.0, 0.0, torch.inf, 7.0]).repeat(m, 1))
    x[:, 2] = torch.nan
    out = ops.csr_matmul(values, columns, offsets, x, 4)
    assert torch.equal(out.isnan(), torch.tensor([True, False, False, True]).repeat(m, 1))
    back = ops.csr_matmul_transposed(values, columns, offsets, torch.tensor([1.0, torch.nan, 2.0, 1.0]).repeat(m, 1), 4)
    assert torch.equal(back, torch.tensor([torch.inf, 3.0, 5.0, 0.0]).repeat(m, 1))


@pytest.mark.parametrize("m", [1, 3, 20])
def test_columns_outside_add_nothing(ops: Ops, m: int, generator: torch.Generator):
    columns = torch.tensor([0, 3, 2147483647, -1, 2, 3], dtype=torch.int32)
    values = torch.tensor([1.0, torch.inf, torch.nan, 2.0, 3.0, 5.0])
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    x, g = torch.randn(m, 3, generator=generator), torch.randn(m, 2, generator=generator)
    expected = torch.stack([x[:, 0], 3 * x[:, 2]], 1)
    torch.testing.assert_close(ops.csr_matmul(values, columns, offsets, x, 2), expected)
    grads = ops.csr_grad_values(columns, offsets, g, x, torch.float32)
    assert torch.equal(grads[[1, 2, 3, 5]], torch.zeros(4))
    torch.testing.assert_close(grads[4], (g[:, 1] * x[:, 2]).sum())
    last = torch.tensor([0, 2, 3], dtype=torch.int32).to(torch.uint16)
    back = ops.csr_matmul_transposed(values[:3], last, torch.tensor([0, 2, 3]), g, 2)
    assert torch.equal(back, torch.stack([g[:, 0], torch.zeros(m)], 1))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 6, 50])
def test_add(ops: Ops, m: int, out_dtype: torch.dtype, generator: torch.Generator):
    csr = octavo.sparse.dense_to_csr(sparse(37, 70, 0.2, "stripes", generator))
    x = torch.randn(m, 70, generator=generator).to(torch.bfloat16)
    before = torch.randn(m, 37, generator=generator).to(out_dtype)
    expected = before.double() + reference.csr_matmul(*csr, x, 37)
    magnitude = before.double().abs() + reference.csr_matmul(csr[0].abs(), *csr[1:], x.abs(), 37)
    if ops.backend == "cuda":
        out = before.cuda()
        torch.ops.octavo.csr_matmul_add(out, *(t.cuda() for t in csr), x.cuda())
    else:
        out = before.clone()
        ops.csr_matmul_add(out, *csr, x)
    check(out.cpu(), expected, magnitude, 70)
    again = before.clone()
    reference.csr_matmul_add(again, *csr, x)
    torch.testing.assert_close(out.cpu(), again)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", CSR_TEST_SHAPES, ids=str)
def test_the_products_of_gradients(
    ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
):
    m, n, k = shape
    for i, kind in enumerate(KINDS):
        dense = sparse(n, k, 0.1, kind, generator)
        columns, offsets = (torch.int32, torch.uint16)[i % 2], (torch.int64, torch.int32)[i % 2]
        csr = as_dtypes(octavo.sparse.dense_to_csr(dense), dtype, columns, offsets)
        weight = dense.to(dtype)
        g, x = (torch.randn(m, size, generator=generator).to(dtype) for size in (n, k))
        actual = ops.csr_matmul_transposed(*csr, g, k)
        assert actual.dtype == dtype
        magnitude = g.double().abs() @ weight.double().abs()
        check(actual, reference.csr_matmul_transposed(*csr, g, k), magnitude, n, g @ weight)
        for out_dtype in FLOATS:
            grads = ops.csr_grad_values(*csr[1:], g, x, out_dtype)
            assert grads.dtype == out_dtype
            absolute = reference.csr_grad_values(*csr[1:], g.abs(), x.abs())
            check(grads, reference.csr_grad_values(*csr[1:], g, x), absolute, m)


def test_the_same_bits_with_any_number_of_threads(generator: torch.Generator):
    dense = sparse(300, 700, 0.2, "stripes", generator)
    csr = octavo.sparse.dense_to_csr(dense)
    g = torch.randn(150, 300, generator=generator)
    before = torch.get_num_threads()
    results = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            results[count] = [
                octavo.ops.csr_matmul(*csr, torch.randn(m, 700, generator=torch.Generator().manual_seed(m)), 300)
                for m in (1, 7, 150)
            ]
            results[count].append(octavo.ops.csr_matmul_transposed(*csr, g, 700))
            results[count].append(octavo.ops.csr_grad_values(*csr[1:], g, g @ dense))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


def broken(**changes: Tensor) -> dict[str, Tensor]:
    good = {
        "values": torch.ones(3),
        "columns": torch.tensor([0, 1, 1], dtype=torch.int32),
        "row_offsets": torch.tensor([0, 2, 3], dtype=torch.int32),
        "x": torch.ones(4, 2),
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.ones(2)}, r"values must have shape \[3\] .* got \[2\]"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "values must be float32, .* got float64"),
        ({"columns": torch.tensor([0, 1, 1])}, "columns must be int32 or uint16, got int64"),
        ({"columns": torch.ones(3, 1, dtype=torch.int32)}, "columns must have 1 dimension"),
        ({"row_offsets": torch.zeros(3)}, "row_offsets must be int32 or int64, got float32"),
        ({"row_offsets": torch.zeros(0, dtype=torch.int32)}, "one element more than there are rows, got none"),
        ({"row_offsets": torch.tensor([0, 3])}, "n is 2 but row_offsets has 2 elements, which makes 1 rows"),
        ({"x": torch.ones(4, 2, dtype=torch.int8)}, "x must be float32, .* got int8"),
        ({"x": torch.ones(())}, "x must have at least 1 dimension"),
    ],
)
def test_errors_name_the_values(ops: Ops, changes: dict[str, Tensor], message: str):
    with pytest.raises(RuntimeError, match=message):
        ops.csr_matmul(*broken(**changes).values(), 2)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3], "must begin with 0, got 1"),
        ([0, 2, 4], "must end with the number of entries, 3, got 4"),
        ([0, 4, 3], "must not decrease, got 4, 3 at 1, 2"),
        ([0, -1, 3], "must not decrease, got 0, -1 at 0, 1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_are_checked_on_the_cpu(offsets: list[int], dtype: torch.dtype, message: str):
    arguments = broken(row_offsets=torch.tensor(offsets, dtype=dtype))
    with pytest.raises(RuntimeError, match=message):
        octavo.ops.csr_matmul(*arguments.values(), 2)
    with pytest.raises(ValueError, match="validate_csr: row_offsets"):
        octavo.sparse.validate_csr(*list(arguments.values())[:3], 2)


def test_more_errors(ops: Ops):
    csr = list(broken().values())[:3]
    with pytest.raises(RuntimeError, match=r"bias must have shape \[2\]"):
        ops.csr_matmul(*csr, torch.ones(4, 2), 2, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"out has shape \[4, 3\] but x \[4, 2\]"):
        ops.csr_matmul_add(torch.ones(4, 3), *csr, torch.ones(4, 2))
    with pytest.raises(RuntimeError, match="the last dimension of g must be 2"):
        ops.csr_matmul_transposed(*csr, torch.ones(4, 3), 2)
    with pytest.raises(RuntimeError, match="k must be from 0 to 2147483647, got -1"):
        ops.csr_matmul_transposed(*csr, torch.ones(4, 2), -1)
    with pytest.raises(RuntimeError, match="g must be float32, got float16"):
        ops.csr_grad_values(*csr[1:], torch.ones(4, 2).half(), torch.ones(4, 2), torch.float32)
    with pytest.raises(RuntimeError, match="the same leading dimensions"):
        ops.csr_grad_values(*csr[1:], torch.ones(3, 2), torch.ones(4, 2), torch.float32)
    if ops.backend != "cuda":
        with pytest.raises(RuntimeError, match="out must be contiguous"):
            ops.csr_matmul_add(torch.ones(2, 4).t(), *csr, torch.ones(4, 2))


# ---- making and checking --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 40, 65536, 65537])
def test_dense_and_back(dtype: torch.dtype, k: int, generator: torch.Generator):
    dense = (torch.randn(3, k, generator=generator) * (torch.rand(3, k, generator=generator) < 0.5)).to(dtype)
    csr = octavo.sparse.dense_to_csr(dense)
    octavo.sparse.validate_csr(*csr, k)
    assert csr[0].dtype == dtype
    assert csr[1].dtype == (torch.uint16 if k <= 65536 else torch.int32)
    assert csr[2].dtype == torch.int32
    assert len(csr[0]) == (dense != 0).sum()
    assert torch.equal(octavo.sparse.csr_to_dense(*csr, k), dense)
    large = octavo.sparse.dense_to_csr(dense, threshold=1.5)
    assert torch.equal(octavo.sparse.csr_to_dense(*large, k), dense.masked_fill(dense.abs() < 1.5, 0))
    mask = torch.rand(3, k, generator=generator) < 0.3
    picked = octavo.sparse.dense_to_csr(dense, mask=mask)
    assert len(picked[0]) == mask.sum()  # zeros included
    assert torch.equal(octavo.sparse.csr_to_dense(*picked, k), dense * mask)


def test_making_keeps_special_values_and_empty_shapes():
    dense = torch.tensor([[0.0, torch.nan, 1.0], [-torch.inf, 0.5, -0.0]])
    values, columns, offsets = octavo.sparse.dense_to_csr(dense, threshold=1.0)
    assert values.isnan().tolist() == [True, False, False]
    assert columns.tolist() == [1, 2, 0]
    assert offsets.tolist() == [0, 2, 3]
    for shape in ((0, 4), (4, 0), (0, 0)):
        csr = octavo.sparse.dense_to_csr(torch.zeros(shape))
        octavo.sparse.validate_csr(*csr, shape[1])
        assert octavo.sparse.csr_to_dense(*csr, shape[1]).shape == shape
    double = (torch.tensor([1.0, 2.0]), torch.tensor([1, 1], dtype=torch.int32), torch.tensor([0, 2]))
    octavo.sparse.validate_csr(*double, 2)
    assert octavo.sparse.csr_to_dense(*double, 2).tolist() == [[0.0, 3.0]]
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    octavo.sparse.csr_to_dense(values, *double[1:], 2).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: octavo.sparse.dense_to_csr(torch.ones(3)), r"must be a matrix, got shape \[3\]"),
        (
            lambda: octavo.sparse.dense_to_csr(torch.ones(2, 2), 1.0, torch.ones(2, 2, dtype=torch.bool)),
            "exclude each other",
        ),
        (lambda: octavo.sparse.dense_to_csr(torch.ones(2, 2), -1.0), "threshold must be 0 or positive, got -1.0"),
        (lambda: octavo.sparse.dense_to_csr(torch.ones(2, 2), math.nan), "threshold must be 0 or positive, got nan"),
        (
            lambda: octavo.sparse.dense_to_csr(torch.ones(2, 2), mask=torch.ones(2)),
            r"mask must be bool of shape \[2, 2\]",
        ),
    ],
)
def test_making_names_what_is_wrong(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": torch.tensor([0, 2, 1], dtype=torch.int32)}, r"in \[0, 2\), got 2 in row 0 \(entry 1\)"),
        ({"columns": torch.tensor([0, 1, -5], dtype=torch.int32)}, r"in \[0, 2\), got -5 in row 1 \(entry 2\)"),
        ({"columns": torch.tensor([1, 0, 1], dtype=torch.int32)}, r"ascend within a row, got \[1, 0\] in row 0"),
        ({"values": torch.ones(2)}, r"need shapes \[nnz\], \[nnz\] and \[n \+ 1\], got \[\[2\]"),
        ({"row_offsets": torch.zeros(0, dtype=torch.int32)}, "need shapes"),
    ],
)
def test_validate_names_what_is_wrong(changes: dict[str, Tensor], message: str):
    octavo.sparse.validate_csr(*list(broken().values())[:3], 2)
    with pytest.raises(ValueError, match=message):
        octavo.sparse.validate_csr(*list(broken(**changes).values())[:3], 2)
    with pytest.raises(TypeError, match="columns must be int32 or uint16"):
        octavo.sparse.validate_csr(torch.ones(1), torch.zeros(1), torch.tensor([0, 1]), 1)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("lead", "n", "k"), [((5,), 8, 16), ((2, 3), 33, 130), ((), 8, 16), ((40,), 7, 300)])
def test_gradients_are_the_dense_ones(
    dtype: torch.dtype, lead: tuple[int, ...], n: int, k: int, generator: torch.Generator
):
    mask = torch.rand(n, k, generator=generator) < 0.2
    weight = torch.randn(n, k, generator=generator).to(dtype)
    values, columns, offsets = octavo.sparse.dense_to_csr(weight, mask=mask)
    x, grad = (torch.randn(*lead, size, generator=generator).to(dtype) for size in (k, n))
    bias = torch.randn(n, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (values, x, bias)]
    octavo.csr_matmul(leaves[0], columns, offsets, leaves[1], n, leaves[2]).backward(grad)
    exact = [t.double().requires_grad_() for t in ((weight * mask), x, bias)]
    torch.nn.functional.linear(exact[1], exact[0], exact[2]).backward(grad.double())
    for leaf, expected in ((leaves[0], exact[0].grad[mask]), (leaves[1], exact[1].grad), (leaves[2], exact[2].grad)):
        assert leaf.grad.dtype == leaf.dtype
        scale = expected.abs().max()
        torch.testing.assert_close(
            leaf.grad.double() / scale, expected / scale, rtol=0, atol=2 * torch.finfo(leaf.dtype).eps
        )


def test_only_what_is_asked_for_is_computed_and_nothing_twice(generator: torch.Generator):
    csr = octavo.sparse.dense_to_csr(sparse(9, 20, 0.3, "scattered", generator))
    x = torch.randn(4, 20, generator=generator)
    plain = octavo.csr_matmul(*csr, x, 9)
    assert not plain.requires_grad
    assert torch.equal(plain, octavo.ops.csr_matmul(*csr, x, 9))
    out = octavo.csr_matmul(*csr, x.requires_grad_(), 9)
    assert torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert octavo.csr_matmul(*csr, x, 9).dtype == torch.bfloat16


def test_compiles_in_one_graph(generator: torch.Generator):
    csr = octavo.sparse.dense_to_csr(sparse(9, 20, 0.3, "scattered", generator))
    x = torch.randn(4, 20, generator=generator)

    def loss(values: Tensor, x: Tensor) -> Tensor:
        return octavo.csr_matmul(values, csr[1], csr[2], x, 9).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (csr[0], x)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_sparse_tuning_learns_a_difference(generator: torch.Generator):
    """A frozen weight and a sparse difference: the gradient of values finds the difference, and x's passes through."""
    base = torch.randn(16, 24, generator=generator)
    mask = torch.rand(16, 24, generator=generator) < 0.1
    target = base + torch.randn(16, 24, generator=generator) * mask
    values, columns, offsets = octavo.sparse.dense_to_csr(torch.zeros(16, 24), mask=mask)
    values.requires_grad_()
    optimizer = torch.optim.Adam([values], lr=0.1)
    for _ in range(150):
        x = torch.randn(32, 24, generator=generator)
        loss = (x @ base.T + octavo.csr_matmul(values, columns, offsets, x, 16) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(
        base + octavo.sparse.csr_to_dense(values.detach(), columns, offsets, 24), target, rtol=0, atol=2e-2
    )
