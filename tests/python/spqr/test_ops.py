"""SpQR weights: the layout to the bit, and products and dequantization against the reference, on every machine."""

from __future__ import annotations

from typing import Any

import octavo
import pytest
import torch
from backends import Ops
from octavo import reference
from octavo.spqr import SpQRWeight, packing
from spqr_weights import random_weight
from torch import Tensor

# n, k, and settings: tile tails in rows, a chunk of one group, every bit count and group size, both forms of statistics
CASES: list[tuple[int, int, dict[str, Any]]] = [
    (16, 32, {}),
    (1, 16, {}),
    (17, 48, {"bits": 2}),
    (40, 80, {"bits": 4, "outliers": 0.2}),
    (33, 192, {"group_size": 64, "stats_group_size": 32}),
    (64, 160, {"group_size": 32, "bits": 4, "bilevel": False}),
    (50, 576, {"bilevel": False, "perm": False}),
    (70, 1040, {"scale_bits": 4, "zero_bits": 3, "stats_group_size": 48}),
    (35, 96, {"scale_bits": 2, "zero_bits": 1, "outliers": 0.0, "unit": 2.0**40}),
]


def ids(case: object) -> str:
    return str(case).replace(" ", "")


def linear(ops: Any, x: Tensor, w: SpQRWeight, bias: Tensor | None = None) -> Tensor:
    sizes = (w.group_size, w.stats_group_size, w.scale_bits, w.zero_bits)
    return ops.spqr_linear(x, *w.arguments(), bias, w.n, *sizes)


def dequantize(ops: Any, w: SpQRWeight, dtype: torch.dtype) -> Tensor:
    sizes = (w.group_size, w.stats_group_size, w.scale_bits, w.zero_bits)
    return ops.spqr_dequantize(*w.arguments(), w.n, w.k, dtype, *sizes)


def check_product(ops: Any, x: Tensor, w: SpQRWeight, bias: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of torch's product in x's dtype, plus fp32 noise of the terms."""
    weight = dequantize(reference, w, torch.float32)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    got = linear(ops, x, w, bias)
    assert got.dtype is x.dtype
    assert got.shape == exact.shape
    rows = x.reshape(-1, w.k)
    peer = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    terms = (rows.double().abs() @ weight.double().abs().t()).reshape(exact.shape)
    allowed = 2 * (peer.double() - exact).abs().max() + 2e-6 * terms
    assert bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_round_trips(bits: int):
    codes = torch.randint(0, 2**bits, (37, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = packing.pack_codes(codes, bits)
    assert words.shape == (3, 3, bits, 16)
    assert torch.equal(packing.unpack_codes(words, 37, 80), codes)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 1), (15, 30), (15, 31), (16, 32), (20, 63), (5, 9), (5, 10)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layout_as_documented(bits: int, row: int, column: int):
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[row, column] = value = 2**bits - 1
    e, parity = column % 32 // 2, column % 2
    words = torch.zeros(2, 2, bits, 16, dtype=torch.int64)
    tile = words[row // 16, column // 32, :, row % 16]
    if bits == 3 and e == 15:
        tile += 1 << (15 + 16 * parity)
    else:
        per_word = 16 // bits
        tile[e // per_word] = value << (bits * (e % per_word) + 16 * parity)
    assert torch.equal(packing.pack_codes(codes, bits).long() & 0xFFFFFFFF, words)


def test_statistics_and_ids_round_trip():
    g = torch.Generator().manual_seed(0)
    for scale_bits, zero_bits in ((3, 3), (1, 4), (4, 4), (2, 3)):
        scales, zeros = (torch.randint(0, 2**b, (37, 5), generator=g) for b in (scale_bits, zero_bits))
        records = packing.pack_fields(scales, zeros, scale_bits, zero_bits)
        assert records.shape == (3, 5, 2 * (scale_bits + zero_bits))
        field = int.from_bytes(bytes(records[1, 2].tolist()), "little") >> (scale_bits + zero_bits) * 7
        assert field & (2 ** (scale_bits + zero_bits) - 1) == int(scales[23, 2]) | int(zeros[23, 2]) << scale_bits
        unpacked = packing.unpack_fields(records, 37, scale_bits, zero_bits)
        assert all(torch.equal(a, b) for a, b in zip(unpacked, (scales, zeros), strict=True))
    for k in (48, 65536, 65552):
        perm = torch.randperm(k, generator=g)
        packed = packing.pack_perm(perm)
        assert len(packed) == (k if k > 65536 else k // 2)
        assert torch.equal(packing.unpack_perm(packed, k), perm)
        columns, values = torch.tensor([0, 7, k - 1]), torch.tensor([1.5, -0.0, -65504.0]).half()
        back = packing.unpack_outliers(packing.pack_outliers(columns, values, k))
        assert torch.equal(back[0], columns)
        assert torch.equal(back[1].view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_dequantize_is_the_reference_to_the_bit(ops: Ops, case: tuple[int, int, dict[str, Any]], dtype: torch.dtype):
    weight = random_weight(case[0], case[1], **case[2])
    assert torch.equal(dequantize(ops, weight, dtype), dequantize(reference, weight, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16, 17, 40])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_products(ops: Ops, case: tuple[int, int, dict[str, Any]], m: int, dtype: torch.dtype):
    if ops.backend.startswith("simt") and (m in (3, 7) or "forward" not in ops.backend) and case[1] > 200:
        pytest.skip("slow on the emulated machine; smaller shapes cover it")
    weight = random_weight(case[0], case[1], **{"unit": 2.0**-9, **case[2]})
    if weight.unit.item() > 1 and dtype is torch.float16:
        pytest.skip("the product is beyond fp16")
    g = torch.Generator().manual_seed(m)
    x = torch.randn(m, case[1], generator=g).to(dtype)
    check_product(ops, x, weight, torch.randn(case[0], generator=g) if m % 2 else None)


def test_wide_weights(ops: Ops):
    """Columns beyond 65535, and 32768 in 16 bits: no sign is extended."""
    for k in (40000, 65552):
        weight = random_weight(18, k, outliers=0.0005)
        x = torch.randn(2, k, generator=torch.Generator().manual_seed(0))
        assert torch.equal(dequantize(ops, weight, torch.float32), dequantize(reference, weight, torch.float32))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_product(ops, x.to(dtype), weight)


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 16), (4, 32)])
def test_one_large_element_costs_no_bits(ops: Ops, bits: int, group_size: int, dtype: torch.dtype, m: int):
    """Up to 16 rows, codes are multiplied exactly: what is left of the product beside a bias of its opposite is the
    rounding of sums in fp32."""
    weight = random_weight(33, 1024, bits=bits, group_size=group_size, unit=2.0**-9)
    row = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    row[7] = 3000.0
    dense = dequantize(reference, weight, torch.float32).double()
    exact = dense @ row.double()
    bias = -exact.float()
    left = linear(ops, row.expand(m, -1), weight, bias).double() - (exact + bias.double())
    assert bool((left.abs() <= 2e-6 * (dense.abs() @ row.double().abs())).all())


@pytest.mark.parametrize("m", [1, 3, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_does_not_matter(ops: Ops, m: int, dtype: torch.dtype):
    """A power of two in x is one in the product, to the bit, well within fp32's range: nothing is added that x does
    not scale."""
    weight = random_weight(33, 96, outliers=0.1)
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = linear(ops, x, weight)
    for exponent in (-80, 80):
        assert torch.equal(linear(ops, x * 2.0**exponent, weight), product * 2.0**exponent)


def test_shapes_views_and_empty(ops: Ops):
    weight = random_weight(20, 64)
    x = torch.randn(4, 3, 128, generator=torch.Generator().manual_seed(0))[..., ::2]
    got = linear(ops, x, weight)
    assert got.shape == (4, 3, 20)
    assert torch.equal(got, linear(ops, x.contiguous(), weight))
    assert torch.equal(linear(ops, x[0, 0], weight), linear(ops, x[0, :1], weight)[0])
    assert linear(ops, x[:0], weight).shape == (0, 3, 20)
    empty = random_weight(0, 64)
    assert linear(ops, x, empty).shape == (4, 3, 0)
    nothing = random_weight(20, 0, outliers=0.0)
    bias = torch.randn(20)
    assert torch.equal(linear(ops, torch.empty(2, 0), nothing, bias), bias.expand(2, 20))


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_rows_stay_alone(ops: Ops, m: int, dtype: torch.dtype):
    weight = random_weight(20, 64)
    x = torch.randn(m, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = linear(ops, x, weight)
    x[0, 5], x[2, 60] = float("nan"), float("inf")
    got = linear(ops, x, weight)
    assert not got[[0, 2]].isfinite().any()
    others = [i for i in range(m) if i not in (0, 2)]
    assert torch.equal(got[others], clean[others])


def test_bad_input_is_named():
    w = random_weight(20, 64)
    x = torch.randn(2, 64)
    arguments = list(w.arguments())

    def call(x: Tensor = x, n: int = 20, group: int = 16, bias: Tensor | None = None, **changed: Tensor) -> None:
        named = dict(
            zip(("codes", "statistics", "second", "unit", "outliers", "offsets", "perm"), arguments, strict=True)
        )
        octavo.ops.spqr_linear(x, *(named | changed).values(), bias, n, group)

    for message, change in (
        (r"x must be float32, float16 or bfloat16, got float64", {"x": x.double()}),
        (r"k = 60 is not a multiple of group_size 16", {"x": x[:, :60]}),
        (r"group_size must be 16, 32 or 64, got 8", {"group": 8}),
        (r"codes must have shape \[3, 2, 3, 16\].*got \[2, 2, 3, 16\]", {"n": 40}),
        (r"codes must be int32, got int64", {"codes": w.codes.long()}),
        (r"statistics must have shape \[2, 4, 12\].*got \[2, 3, 12\]", {"statistics": w.statistics[:, :3]}),
        (r"second_order must be float16, got float32", {"second": w.second_order.float()}),  # type: ignore[union-attr]
        (r"row_offsets must have shape \[21\] \(n \+ 1\), got \[20\]", {"offsets": w.row_offsets[:-1]}),
        (r"perm must have shape \[32\].*got \[64\]", {"perm": torch.zeros(64, dtype=torch.int32)}),
        (r"bias must have shape \[20\] \(the output features\), got \[19\]", {"bias": torch.ones(19)}),
        (r"outliers must have shape \[4, 1\].*got \[4, 2\]", {"outliers": torch.zeros(4, 2, dtype=torch.int32)}),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**change)  # type: ignore[arg-type]


def test_sizes_that_overflow_are_refused():
    w = random_weight(48, 32, outliers=0.0)
    tensors = list(w.arguments())
    tensors[2] = torch.zeros(0, 2, 4, dtype=torch.float16)
    for n, stats_group_size, message in (
        (48, 2**63 - 16, "stats_group_size must be a multiple of 16 up to 1024, got 9223372036854775792"),
        (2**63 - 1, 16, r"n must be from 0 to below 2\^40, got 9223372036854775807"),
    ):
        with pytest.raises(RuntimeError, match=message):
            octavo.ops.spqr_linear(torch.ones(1, 32), *tensors, None, n, 16, stats_group_size)
        with pytest.raises(RuntimeError, match=message):
            octavo.ops.spqr_dequantize(*tensors, n, 32, torch.float32, 16, stats_group_size)


def test_accounting():
    weight = random_weight(64, 512, outliers=0.0)
    assert weight.nominal_bits == 3.625
    assert weight.real_bits == 3.625 + 32 * 65 / (64 * 512) + 16 / 64 + 32 / (64 * 512)
    weight = random_weight(64, 512, bits=4, group_size=32, stats_group_size=32, outliers=0.01)
    share = weight.outlier_count / (64 * 512)
    assert weight.nominal_bits == pytest.approx(4 + 6 / 32 + 64 / 1024 + 32 * share)
    assert random_weight(64, 512, bilevel=False, outliers=0.0).nominal_bits == 5.0


def test_validation_names_what_is_wrong():
    weight = random_weight(20, 64, outliers=0.1)
    assert weight.validate() == []
    offsets = weight.row_offsets.clone()
    offsets[5] = 0
    broken = SpQRWeight(**{**vars(weight), "row_offsets": offsets})
    assert "row_offsets decrease at row 4" in broken.validate()[0]
    words = weight.outliers.clone()
    words[3, 0] = (words[3, 0] & ~0xFFFF) | 64
    assert "has column 64, k is 64" in SpQRWeight(**{**vars(weight), "outliers": words}).validate()[0]
    words = weight.outliers.clone()
    words[[3, 4]] = words[[4, 3]]
    assert "do not ascend" in SpQRWeight(**{**vars(weight), "outliers": words}).validate()[0]
    perm = weight.perm.clone()  # type: ignore[union-attr]
    perm[0] = perm[1]
    assert "not a permutation" in SpQRWeight(**{**vars(weight), "perm": perm}).validate()[0]
    assert "unit" in SpQRWeight(**{**vars(weight), "unit": torch.tensor([0.0])}).validate()[0]
