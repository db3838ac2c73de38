"""Every operator on more than 2^31 elements, where an index in int32 is negative: ``python -m pytest -m huge -n 0``.

What an operator makes of the last rows of a large tensor is what it makes of them alone, so these are compared. A case
needs up to 22 GiB of memory and is skipped, and named, where that is not free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from cases import WITH_SUMS
from octavo import ops
from spqr_weights import random_weight
from torch import Tensor

ROWS, COLUMNS = 1 << 17, (1 << 14) + 1  # 2^31 + 2^17 elements
LAST = 3  # rows that are compared
BF16 = torch.bfloat16

pytestmark = pytest.mark.huge


def need(gigabytes: int, device: str) -> None:
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of memory on {device}, {free >> 30} are free")


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two of these at a time would fill the memory."""
    if hasattr(request.config, "workerinput"):
        pytest.fail("tests of huge tensors run one after the other: python -m pytest -m huge -n 0")
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def zeros_but_last(dtype: torch.dtype, device: str, columns: int = COLUMNS) -> Tensor:
    x = torch.zeros(ROWS, columns, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(0)
    last = torch.randn(LAST, columns, generator=g) * 20
    x[-LAST:] = last.to(device, dtype) if dtype.is_floating_point else last.round().clamp(-127, 127).to(device, dtype)
    return x


def same(one: Tensor, two: Tensor) -> None:
    assert one.shape == two.shape and one.dtype == two.dtype
    assert torch.equal(one, two)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_quantize_rowwise(device, threshold):
    need(8, device)
    x = zeros_but_last(BF16, device)
    codes, scale = ops.quantize_rowwise(x, threshold)
    one, two = ops.quantize_rowwise(x[-LAST:], threshold)
    same(codes[-LAST:], one)
    same(scale[-LAST:], two)
    assert not codes[:-LAST].any() and not scale[:-LAST].any() and one.any()


@pytest.mark.parametrize(
    "name", ["quantize_columnwise", "quantize_tensorwise", "quantize_rowwise_columnwise",
             "quantize_tensorwise_transpose", "quantize_columnwise_transpose", "quantize_rowwise_columnwise_transpose"]
)  # fmt: skip
def test_other_scales(device, name):
    need(14, device)
    x = zeros_but_last(BF16, device)
    results = getattr(ops, name)(x)
    alone = getattr(ops, name)(x[-LAST:])
    for of_all, of_last in zip(results, alone, strict=True):
        if of_all.dim() == 2 and of_all.shape[1] == ROWS:
            of_all = of_all[:, -LAST:]
        elif of_all.shape[:1] == (ROWS,):
            of_all = of_all[-LAST:]
        same(of_all, of_last)


def test_dequantize_rowwise(device):
    need(9, device)
    codes = zeros_but_last(torch.int8, device)
    scale = torch.full((ROWS,), 0.5, device=device)
    y = ops.dequantize_rowwise(codes, scale, BF16)
    same(y[-LAST:], ops.dequantize_rowwise(codes[-LAST:], scale[-LAST:], BF16))
    assert not y[:-LAST].any()


def test_columns(device):
    need(6, device)
    x = torch.zeros(ROWS, COLUMNS, dtype=BF16, device=device)
    x[-1, -1] = 7.0
    columns, count = ops.find_outlier_columns(x, 6.0)
    assert count.item() == 1 and columns[0].item() == COLUMNS - 1
    picked = ops.extract_columns(x, columns, count)
    assert picked[-1, 0] == 7 and not picked[:-1].any()


def test_int8_columns(device):
    need(4, device)
    weight = zeros_but_last(torch.int8, device)
    columns = torch.full((COLUMNS,), COLUMNS, dtype=torch.int32, device=device)
    columns[0] = COLUMNS - 1
    count, scale = torch.ones(1, dtype=torch.int32, device=device), torch.full((ROWS,), 0.5, device=device)
    picked = ops.extract_int8_columns(weight, scale, columns, count, torch.float32)
    assert torch.equal(picked[-LAST:, 0], weight[-LAST:, -1] * 0.5) and not picked[:-LAST].any()


def test_blockwise(device):
    need(12, device)
    x = zeros_but_last(BF16, device)
    blocks = 256 * (-(-LAST * COLUMNS // 256) - 1)  # whole blocks at the end
    count = x.numel()
    start = (count - blocks) // 256 * 256
    codes, absmax = ops.quantize_blockwise(x)
    one, two = ops.quantize_blockwise(x.view(-1)[start:])
    same(codes.view(-1)[start:], one)
    same(absmax[start // 256 :], two)
    del x
    y = ops.dequantize_blockwise(codes, absmax, BF16)
    same(y.view(-1)[start:], ops.dequantize_blockwise(one, two, BF16))
    assert one.unique().numel() > 50


def test_4_bits(device):
    need(12, device)
    x = zeros_but_last(BF16, device)
    packed, absmax = ops.nf4_quantize(x, "nf4", 4096)
    start = (x.numel() - COLUMNS) // 4096 * 4096
    one, two = ops.nf4_quantize(x.view(-1)[start:], "nf4", 4096)
    del x
    same(packed[start // 2 :], one)
    same(absmax[start // 4096 :], two)
    y = ops.nf4_dequantize(packed, absmax, None, None, [ROWS, COLUMNS], BF16, "nf4", 4096)
    tail = ops.nf4_dequantize(one, two, None, None, [y.numel() - start], torch.float32, "nf4", 4096)
    same(y.view(-1)[start:], tail.to(BF16))
    last = tail[-COLUMNS:]
    del y
    x = torch.zeros(1, COLUMNS, device=device)
    x[0, -2:] = torch.tensor([1.0, 8.0])
    product = ops.nf4_linear(x, packed, absmax, None, None, None, ROWS, "nf4", 4096)[0]
    torch.testing.assert_close(product[-1], (x[0] * last).sum())
    assert not product[:-LAST].any()
    g = torch.zeros(1, ROWS, device=device)
    g[0, -1] = 2.0
    torch.testing.assert_close(
        ops.nf4_linear_transposed(g, packed, absmax, None, None, COLUMNS, "nf4", 4096)[0], 2 * last
    )


def test_int8_products_of_a_huge_weight(device):
    need(4, device)
    weight, scale = zeros_but_last(torch.int8, device), torch.ones(ROWS, device=device)
    x = torch.ones(2, COLUMNS, dtype=torch.int8, device=device)
    sums = weight[-LAST:].long().sum(1)
    product = ops.int8_mm(x, weight)
    assert product[1, -LAST:].tolist() == sums.tolist() and not product[:, :-LAST].any()
    y = ops.int8_linear(torch.ones(1, COLUMNS, device=device), weight, scale)
    torch.testing.assert_close(y[0, -LAST:], sums.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["int8_mm", "int8_gemm", "int8_linear", "x of int8_linear"])
def test_int8_products_that_are_huge(device, name):
    need(16 if name == "int8_mm" else 10, device)
    columns = COLUMNS if name == "x of int8_linear" else 8
    n = 8 if name == "x of int8_linear" else COLUMNS
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (n, columns), generator=g, dtype=torch.int8).to(device)
    scale = torch.full((n,), 0.5, device=device)
    if name.endswith("int8_linear"):
        x = zeros_but_last(BF16, device, columns)
        y, last = ops.int8_linear(x, weight, scale), ops.int8_linear(x[-LAST:], weight, scale)
    else:
        a = zeros_but_last(torch.int8, device, columns)
        rows = torch.ones(ROWS, device=device)
        if name == "int8_mm":
            y, last = ops.int8_mm(a, weight), ops.int8_mm(a[-LAST:], weight)
        else:
            y = ops.int8_gemm(a, weight, rows, scale, None, BF16)
            last = ops.int8_gemm(a[-LAST:], weight, rows[-LAST:], scale, None, BF16)
    same(y[-LAST:], last)
    assert last.any() and not y[: ROWS // 2].any() and not y[ROWS // 2 : -LAST].any()


def test_sparse(device):
    need(18, device)
    columns = torch.arange(COLUMNS, device=device).to(torch.uint16).repeat(ROWS)
    offsets = torch.arange(ROWS + 1, device=device, dtype=torch.int64) * COLUMNS
    x = torch.zeros(1, COLUMNS, device=device)
    x[0, -2:] = torch.tensor([1.0, 8.0])
    g = torch.zeros(1, ROWS, device=device)
    g[0, -1] = 2.0
    gradient = ops.csr_grad_values(columns, offsets, g, x, BF16)
    assert gradient[-2:].tolist() == [2.0, 16.0] and gradient[: 1 << 30].count_nonzero() == 0
    values = gradient.zero_()
    values[-2:] = torch.tensor([3.0, 5.0])
    y = ops.csr_matmul(values, columns, offsets, x, ROWS)
    assert y[0, -1] == 43 and not y[0, :-1].any()
    ops.csr_matmul_add(y, values, columns, offsets, x)
    assert y[0, -1] == 86 and not y[0, :-1].any()
    back = ops.csr_matmul_transposed(values, columns, offsets, g, COLUMNS)
    assert back[0, -2:].tolist() == [6.0, 10.0] and not back[0, :-2].any()


def test_spqr(device):
    need(8, device)
    rows, k, times = 256, 1 << 14, 513  # 2^31 + 2^22 weights
    one = random_weight(rows, k, 2, outliers=0.0)
    all_ = dataclasses.replace(
        one,
        n=rows * times,
        codes=one.codes.repeat(times, 1, 1, 1),
        statistics=one.statistics.repeat(times, 1, 1),
        second_order=one.second_order.repeat(times, 1, 1),
        row_offsets=torch.zeros(rows * times + 1, dtype=torch.int32),
    )
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    names = ("codes", "statistics", "second_order", "unit", "outliers", "row_offsets", "perm")
    of_one, of_all = ([getattr(w, name).to(device) for name in names] for w in (one, all_))
    y = ops.spqr_linear(x, *of_all, None, all_.n, 16)
    same(y[:, -rows:], ops.spqr_linear(x, *of_one, None, rows, 16))
    dense = ops.spqr_dequantize(*of_all, all_.n, k, BF16, 16)
    same(dense[-rows:], ops.spqr_dequantize(*of_one, rows, k, BF16, 16))


def test_spqr_quantize_columns(device):
    need(44, device)
    k, n = 32, (1 << 26) + 16
    weight = torch.zeros(n, k, device=device)
    weight[-LAST:] = torch.randn(LAST, k, generator=torch.Generator().manual_seed(0)).to(device)
    factor = torch.eye(k, device=device)
    of_all = ops.spqr_quantize_columns(weight, factor, 0.3, 3, 16)
    for one, two in zip(of_all, ops.spqr_quantize_columns(weight[-LAST:], factor, 0.3, 3, 16), strict=True):
        if one.dim() == 2:
            same(one[-LAST:], two)


@pytest.mark.parametrize("rule", ["adam", "lion", "lamb", "lars", "stable_adamw"])
def test_optimizers(device, rule):
    """The last elements alone are a parameter of their own, whose blocks of 256 begin where theirs begin. Nothing but
    the dither of the states, which is over elements' numbers, differs; sums run over other blocks."""
    moments = 1 if rule in ("lion", "lars") else 2
    need(10 + 2 * moments, device)
    last = LAST << 14
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(last, generator=generator).to(device, BF16) for _ in range(2)]
    results = []
    for count in ((1 << 31) + last, last):
        param, grad = (torch.zeros(count, dtype=BF16, device=device) for _ in range(2))
        param[-last:], grad[-last:] = values
        states = [torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(moments)]
        absmax = [torch.zeros(count // 256, device=device) for _ in range(moments)]
        lists = ([param], [grad], [torch.tensor(1.0, dtype=torch.float64, device=device)], states, absmax, [])
        table = ops.optim_table(*lists, [7])
        hyper = [1e-2, 0.0, 1e-8, 0.9, 0.99, 0.9999, 0.0, 2.0, 0.0, 0.0, 0.0, 1e-3, 0.0, 0.0, 1.0]
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        sums = ops.optim_sums(*lists, table, rule, hyper) if rule in WITH_SUMS else None
        ops.optim_step(*lists, nonfinite, table, rule, hyper, sums=sums)
        assert nonfinite.item() == 0
        assert not param[:-last].any() and not torch.equal(param[-last:], values[0])
        results.append([param[-last:].clone(), *(one[-last // 256 :].clone() for one in absmax)])
        del param, grad, states, absmax, lists, table
    for large, small in zip(*results, strict=True):
        torch.testing.assert_close(large, small, rtol=2e-2 if rule in WITH_SUMS else 0, atol=0)
