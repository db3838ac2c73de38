"""8-bit block-wise quantization: bits against the reference on every backend, at every threshold of the maps."""

from __future__ import annotations

import hashlib

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo import reference
from torch import Tensor

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
INF, NAN = float("inf"), float("nan")


def check(ops: Ops, x: Tensor, blocksize: int = 256, signed: bool = True, code: Tensor | None = None) -> Tensor:
    """Both operators against the reference; returns the codes."""
    actual = ops.quantize_blockwise(x, blocksize, signed, code)
    expected = reference.quantize_blockwise(x, blocksize, signed, code)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    for dtype in FLOATS:
        values = ops.dequantize_blockwise(*expected, dtype, blocksize, signed, code)
        assert_same(values, reference.dequantize_blockwise(*expected, dtype, blocksize, signed, code))
    return expected[0]


def neighbours(values: Tensor, distance: int = 3) -> Tensor:
    """Every value with the floats up to `distance` units in the last place around it."""
    bits = values.view(torch.int32)[:, None] + torch.arange(-distance, distance + 1, dtype=torch.int32)
    return bits.view(torch.float32).flatten()


@pytest.mark.parametrize(("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_the_map_is_the_published_one(ops: Ops, signed: bool, digest: str):
    values = reference.dynamic_map(signed)
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == digest
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same(ops.dequantize_blockwise(codes, torch.ones(1), torch.float32, 256, signed), values)
    assert values[127 if signed else 0] == 0 and values[255] == 1 and bool((values.diff() > 0).all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("absmax", [1.0, 3.0, 0.7e-3, 2.0**-126, 1e38])
def test_every_threshold_and_value(ops: Ops, signed: bool, absmax: float):
    book = reference.dynamic_map(signed)
    grid = torch.cat([neighbours(reference.thresholds(book).float()), neighbours(book[book != 0])])
    grid = grid[grid.abs() <= 1]
    rows = torch.nn.functional.pad(grid, (0, -len(grid) % 255)).view(-1, 255)
    x = torch.cat([torch.ones(len(rows), 1), rows], 1) * absmax  # each block has the absmax
    check(ops, x, 256, signed)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_their_own_codes_and_ties_go_down(ops: Ops, signed: bool):
    book = reference.dynamic_map(signed)
    assert check(ops, book, 256, signed).tolist() == list(range(256))
    middles = reference.thresholds(book)
    exact = middles.float().double() == middles  # midpoints that are floats
    x = torch.cat([torch.ones(1), torch.where(exact, middles.float(), 0.0)])
    codes = check(ops, x, 256, signed)[1:]
    assert int(exact.sum()) > 100 and torch.equal(codes[exact].long(), torch.arange(255)[exact])


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("more", [-1, 0, 1, 1.5, 2])
def test_random(ops: Ops, more: float, blocksize: int, generator: torch.Generator):
    """Whole blocks, and tails of every kind."""
    count = int(blocksize * (1 + more)) + (1 if more == -1 else 3 if more == 1.5 else 0)
    x = torch.randn(count, generator=generator) ** 3 * torch.logspace(-6, 4, count)
    for number, dtype in enumerate(FLOATS):
        check(ops, x.to(dtype), blocksize, number % 2 == 0)
        check(ops, x.to(dtype), blocksize, number % 2 == 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("signed", [True, False])
def test_special_values_stay_in_their_place(ops: Ops, signed: bool, dtype: torch.dtype, generator: torch.Generator):
    zero, least = (127, 0) if signed else (0, 0)
    x = torch.randn(8, 64, generator=generator).abs().to(dtype)
    plain = check(ops, x, 64, signed)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for column, (value, code) in enumerate(
        [(NAN, zero), (INF, 255), (-INF, least), (0.0, zero), (-0.0, zero), (tiny, None), (-tiny, None)]
    ):
        changed = x.clone()
        changed[:, 5 + column] = value
        changed[:, 0] = 8.0  # the absmax, and nothing special
        codes = check(ops, changed, 64, signed)
        assert code is None or set(codes[:, 5 + column].tolist()) == {code}
        assert bool((codes[:, 0] == 255).all())
    x[3] = NAN
    x[5] = INF
    codes = check(ops, x, 64, signed)
    assert set(codes[3].tolist()) == {zero} and set(codes[5].tolist()) == {zero}  # no finite absmax: a zero block
    others = [0, 1, 2, 4, 6, 7]
    assert torch.equal(codes[others], plain[others])


@pytest.mark.parametrize("signed", [True, False])
def test_small_blocks_are_zero(ops: Ops, signed: bool):
    smallest = 2.0**-126
    below = torch.tensor(smallest).nextafter(torch.tensor(0.0))
    x = torch.stack([torch.full((64,), v) for v in (0.0, -0.0, float(below), smallest, 2.0**-149)])
    x[3, 1:] = 2.0**-149
    check(ops, x, 64, signed)
    _, absmax = ops.quantize_blockwise(x, 64, signed)
    assert absmax.tolist() == [0.0, 0.0, 0.0, smallest, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_code_book_of_the_caller(ops: Ops, dtype: torch.dtype, generator: torch.Generator):
    x = torch.randn(1001, generator=generator).to(dtype)
    x[3], x[400], x[401] = NAN, INF, -INF
    uneven = torch.randn(256, generator=generator, dtype=torch.float64).sort().values.float()
    for code in (torch.linspace(-1, 1, 256), uneven, torch.linspace(0.5, 2, 256)):
        check(ops, x, 64, True, code)
        grid = neighbours(reference.thresholds(code).float()).clamp(-1, 1)
        check(ops, torch.cat([torch.ones(1), grid]), 4096, True, code)


def test_views_are_read_in_place(ops: Ops, generator: torch.Generator):
    base = torch.randn(40, 66, generator=generator)
    for view in (base.t(), base[::2, 1::3], base[:, 5:], base[3:4].expand(4, 66), base.view(2, 20, 66)):
        check(ops, view, 64)
    offset = torch.randn(1300, generator=generator).bfloat16()[1:]  # no 16-byte alignment
    check(ops, offset, 128)
    codes, absmax = reference.quantize_blockwise(base, 64)
    view = codes.t()[3:]
    scale = torch.rand((view.numel() + 63) // 64, generator=generator)
    assert_same(
        ops.dequantize_blockwise(view, scale, torch.float32, 64),
        reference.dequantize_blockwise(view, scale, torch.float32, 64),
    )
    assert absmax.shape == (42,)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (1,), (2, 3, 5)], ids=str)
def test_any_rank_and_empty(ops: Ops, shape: tuple[int, ...]):
    check(ops, torch.full(shape, -2.5), 64)


def test_error_is_within_half_a_cell(ops: Ops, generator: torch.Generator):
    x = torch.randn(100_000, generator=generator)
    codes, absmax = ops.quantize_blockwise(x)
    error = (ops.dequantize_blockwise(codes, absmax, torch.float32) - x).abs()
    scale = absmax.repeat_interleave(256)[: len(x)]
    # The widest cells are those of the last decade, 0.9 / 64; below -0.993 there is no code.
    assert bool((error <= scale * 0.9 / 128 * 1.001).all())
    assert float(error.mean() / x.abs().mean()) < 0.02


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=200), signed=st.booleans())
def test_any_floats(values: list[float], signed: bool):
    x = torch.tensor(values)
    expected = reference.quantize_blockwise(x, 64, signed)
    for level in octavo._C.available_isas():
        before = octavo._C.isa()
        octavo._C.set_isa(level)
        try:
            for a, e in zip(octavo.quantize_blockwise(x, 64, signed), expected, strict=True):
                assert_same(a, e)
        finally:
            octavo._C.set_isa(before)


def test_threads_do_not_change_bits(generator: torch.Generator):
    x = torch.randn(1 << 20, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(octavo.quantize_blockwise(x))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


ONES = torch.ones(100)
CODES = torch.zeros(100, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.quantize_blockwise(ONES.double()), "got float64"),
        (lambda o: o.quantize_blockwise(ONES.int()), "got int32"),
        (lambda o: o.quantize_blockwise(ONES, 100), "power of two from 64 to 4096, got 100"),
        (lambda o: o.quantize_blockwise(ONES, 32), "got 32"),
        (lambda o: o.quantize_blockwise(ONES, 8192), "got 8192"),
        (lambda o: o.quantize_blockwise(ONES, 64, True, torch.ones(255)), "255"),
        (lambda o: o.quantize_blockwise(ONES, 64, True, torch.ones(256, dtype=torch.float16)), "float16"),
        (lambda o: o.dequantize_blockwise(CODES, torch.ones(3), torch.float32, 64), "absmax .*3"),
        (lambda o: o.dequantize_blockwise(CODES.int(), torch.ones(2), torch.float32, 64), "got int32"),
        (lambda o: o.dequantize_blockwise(CODES, torch.ones(2).half(), torch.float32, 64), "got float16"),
        (lambda o: o.dequantize_blockwise(CODES, torch.ones(2), torch.int8, 64), "got int8"),
    ],
)
def test_errors_name_the_values(ops: Ops, call, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)


@pytest.mark.parametrize(
    ("change", "message"), [({7: NAN}, "finite, got nan at 7"), ({7: 2.0}, "ascend, got 2, .* at 7, 8")]
)
def test_code_books_are_checked_on_the_cpu(change: dict[int, float], message: str):
    code = torch.linspace(-1, 1, 256)
    for place, value in change.items():
        code[place] = value
    with pytest.raises(RuntimeError, match=message):
        octavo.quantize_blockwise(ONES, 64, True, code)
