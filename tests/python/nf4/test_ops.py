"""Low-bit block-wise quantization (NF4, FP4, and normal floats of other widths): bits against the reference on every
backend, against the published tables, and against bitsandbytes."""

from __future__ import annotations

import hashlib
from typing import Any

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_bits, special_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo import reference
from octavo.nf4 import weight as nf4
from octavo.nf4.ops import BITS
from octavo.nf4.weight import BLOCKSIZES
from torch import Tensor

TYPES = tuple(BITS)
ZERO = {"nf2": 1, "nf3": 3, "nf4": 7, "nf8": 127, "fp4": 0}
INF, NAN = float("inf"), float("nan")

# As in the kernels of bitsandbytes; NF4's ascending, with the code below each, FP4's of magnitudes.
NF4_THRESHOLDS = (
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
)
FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
FP4_CODES = (0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011)  # of magnitudes, in the order of size


def codes_of(packed: Tensor, count: int, quant_type: str) -> list[int]:
    """The codes, read as the documentation has them: a stream of bits, the upper ones first."""
    bits, number = BITS[quant_type], int.from_bytes(bytes(packed.tolist()), "big")
    return [number >> (8 * len(packed) - bits * (i + 1)) & (1 << bits) - 1 for i in range(count)]


def check(ops: Any, x: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Both operators against the reference, to the bit; returns packed codes and absmax."""
    expected = reference.nf4_quantize(x, quant_type, blocksize)
    for a, e in zip(ops.nf4_quantize(x, quant_type, blocksize), expected, strict=True):
        assert_bits(a, e)
    for dtype in FLOATS:
        arguments = (*expected, None, None, x.shape, dtype, quant_type, blocksize)
        assert_bits(ops.nf4_dequantize(*arguments), reference.nf4_dequantize(*arguments))
    return expected


def check_codes(ops: Any, x: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> list[int]:
    return codes_of(check(ops, x, quant_type, blocksize)[0], x.numel(), quant_type)


def next_to(values: Tensor, distance: int = 1) -> Tensor:
    """Every value between its neighbours up to `distance` units in the last place, and both signs of zero."""
    around = [values]
    for end in (-INF, INF):
        step = values
        for _ in range(distance):
            step = step.nextafter(torch.tensor(end))
            around.append(step)
    return torch.stack(around, 1).flatten()


# ---- code books ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_code_books_are_the_published_ones(ops: Ops, quant_type: str):
    bits = BITS[quant_type]
    codes = torch.arange(2**bits)
    stream = sum(int(code) << bits * (2**bits - 1 - i) for i, code in enumerate(codes))
    packed = torch.tensor(list(int(stream).to_bytes(2**bits * bits // 8, "big")), dtype=torch.uint8)
    blocks = -(-len(codes) // 64)
    values = ops.nf4_dequantize(packed, torch.ones(blocks), None, None, (len(codes),), torch.float32, quant_type)
    assert_bits(values, reference.code_book(quant_type))
    assert values[ZERO[quant_type]] == 0 and values.abs().max() == 1
    digest = {"nf4": "8501941daa1b8a90", "fp4": "b830bcf8857895e5"}.get(quant_type)
    if digest:  # there fp4's code of -0 has the value 0
        assert hashlib.sha256((values + 0.0).numpy().tobytes()).hexdigest()[:16] == digest
    if quant_type != "fp4":
        assert values[0] == -1 and values[-1] == 1 and bool((values.diff() > 0).all())
        defined = reference.normal_float(bits)
        if quant_type == "nf4":  # the published values are off by a few units in the last place
            assert bool(((values - defined).abs() <= 2e-7).all())
        else:
            assert_bits(values, defined)


def test_the_compiled_code_books_are_the_references():
    for name in ("nf2", "nf3", "nf4", "nf8", "fp4"):
        assert_bits(nf4.code_book(name), reference.code_book(name))
    assert_bits(nf4.code_book("dynamic"), reference.dynamic_map(True))
    with pytest.raises(ValueError, match="no code book is called nf5"):
        nf4.code_book("nf5")


def test_the_code_books_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for quant_type in ("nf4", "fp4"):
        theirs = functional.get_4bit_type(quant_type, device="cpu")
        assert_bits(reference.code_book(quant_type) + 0.0, theirs)


def test_normal_floats_by_hand():
    """Quantiles of the normal distribution, evenly spread from 0.9677083 to 0.5, over the largest."""
    top = 1.848131  # of 0.9677083
    assert torch.allclose(reference.normal_float(2), torch.tensor([-1.0, 0.0, 0.624512 / top, 1.0]))
    negative = [-1.0, -0.884569 / top, -0.401307 / top]
    positive = [0.297420 / top, 0.624512 / top, 1.039790 / top, 1.0]
    assert torch.allclose(reference.normal_float(3), torch.tensor([*negative, 0.0, *positive]), atol=1e-6)


# ---- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_thresholds_are_the_published_ones_and_ties_go_down(ops: Ops, quant_type: str):
    book = reference.code_book(quant_type)
    thresholds = torch.tensor(NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS)
    above = thresholds.nextafter(torch.tensor(INF))
    if quant_type == "nf4":
        x, expected = torch.cat([thresholds, above]), [*range(15), *range(1, 16)]
        middles = ((book[1:].double() + book[:-1].double()) / 2).float()
        assert_bits(thresholds, middles)
    else:
        x = torch.cat([thresholds, above, -thresholds, -above])
        expected = [*FP4_CODES[:7], *FP4_CODES[1:]]
        expected += [code + 8 for code in expected]
    assert check_codes(ops, torch.cat([torch.ones(1), x]), quant_type)[1:] == expected


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("absmax", [1.0, 3.0, 0.7e-3, 2.0**-126, 1e38])
def test_beside_every_threshold_and_value(ops: Ops, quant_type: str, absmax: float):
    book = reference.code_book(quant_type)
    ascending = book.double().sort().values
    grid = torch.cat([((ascending[1:] + ascending[:-1]) / 2).float(), book, torch.tensor(FP4_THRESHOLDS)])
    grid = next_to(grid, 1 if quant_type == "nf8" else 3)
    grid = grid[grid.abs() <= 1]
    rows = torch.nn.functional.pad(grid, (0, -len(grid) % 31)).view(-1, 31)
    x = torch.cat([torch.ones(len(rows), 1), rows], 1) * absmax  # each block has the absmax
    check(ops, x, quant_type, 32)
    check(ops, x * -1, quant_type, 32)


@pytest.mark.parametrize("quant_type", TYPES)
def test_values_are_their_own_codes(ops: Ops, quant_type: str):
    book = reference.code_book(quant_type)
    expected = list(range(len(book)))
    if quant_type == "fp4":
        expected[8] = 0  # -0 is 0
    assert check_codes(ops, book, quant_type, 256) == expected


def test_a_tiny_negative_number_keeps_its_sign_in_fp4(ops: Ops):
    codes = check_codes(ops, torch.tensor([1.0, -1e-9, 1e-9, -0.0]), "fp4")
    assert codes == [0b0011, 0b1000, 0b0000, 0b0000]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_random(ops: Ops, blocksize: int, quant_type: str, generator: torch.Generator):
    """Whole blocks, and tails of every kind."""
    counts = [1, blocksize - 1, blocksize, blocksize + 1, int(blocksize * 2.5) + 3, 3 * blocksize]
    if ops.backend.startswith("simt"):
        counts = counts[:: 1 if blocksize == 32 else 3]
    for number, count in enumerate(counts):
        x = torch.randn(count, generator=generator) ** 3 * torch.logspace(-6, 4, count)
        check(ops, x.to(FLOATS[number % 3]), quant_type, blocksize)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_rows_that_hide_bugs(ops: Ops, quant_type: str, dtype: torch.dtype, generator: torch.Generator):
    """NaN, Inf, zeros, denormals and the largest numbers; blocks that are rows, and blocks that cross them."""
    for columns in (64, 48, 33):
        check(ops, special_rows(20, columns, dtype, generator), quant_type)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_special_values_stay_in_their_place(ops: Ops, quant_type: str, dtype: torch.dtype, generator: torch.Generator):
    zero, most, least = ZERO[quant_type], 2 ** BITS[quant_type] - 1, 0
    if quant_type == "fp4":
        most, least = 0b0011, 0b1011
    x = torch.randn(2, 64, generator=generator).clamp(-3, 3)
    x[:, 0] = 8.0  # the absmax, and nothing special
    x = x.to(dtype)
    plain = check_codes(ops, x, quant_type)
    tiny = torch.finfo(dtype).smallest_normal * (1.0 if dtype is torch.float32 else torch.finfo(dtype).eps)
    for place, (value, code) in enumerate([(NAN, zero), (INF, most), (-INF, least), (0.0, zero), (-0.0, zero)], 5):
        changed = x.clone()
        changed[0, place] = value
        codes = check_codes(ops, changed, quant_type)
        assert codes[place] == code
        assert codes[:place] + codes[place + 1 :] == plain[:place] + plain[place + 1 :]
    x[1, 3], x[1, 4] = tiny, -tiny
    expected = zero + 8 if quant_type == "fp4" else zero
    assert check_codes(ops, x, quant_type)[64 + 3 : 64 + 5] == [zero, expected]


@pytest.mark.parametrize("quant_type", TYPES)
def test_blocks_without_a_number_are_zero(ops: Ops, quant_type: str):
    smallest = 2.0**-126
    below = float(torch.tensor(smallest).nextafter(torch.tensor(0.0)))
    values = (0.0, -0.0, NAN, INF, -INF, below, 2.0**-149)
    x = torch.tensor(values)[:, None].expand(-1, 64)
    packed, absmax = check(ops, x, quant_type)
    assert absmax.tolist() == [0.0] * len(values)
    assert set(codes_of(packed, x.numel(), quant_type)) == {ZERO[quant_type]}
    again = ops.nf4_dequantize(packed, absmax, None, None, x.shape, torch.float32, quant_type)
    assert_bits(again, torch.zeros(x.shape))
    if quant_type == "nf4":
        assert set(packed.tolist()) == {0x77}
    x = torch.full((64,), 2.0**-149)
    x[9] = -smallest
    assert check(ops, x, quant_type)[1].tolist() == [smallest]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_magnitude_does_not_matter(ops: Ops, quant_type: str, dtype: torch.dtype, generator: torch.Generator):
    """A power of two in x is one in absmax, and in no code, from the least absmax that there is to the largest."""
    x = torch.randn(3, 64, generator=generator).clamp(-3.9, 3.9).to(dtype)
    x[:, 7] = 4.0
    x[x.abs() < 2.0**-5] = 0.0  # what is left does not become a denormal
    codes, absmax = check(ops, x, quant_type)
    for exponent in (-11, 13) if dtype is torch.float16 else (-121, 125):
        scaled = check(ops, x * 2.0**exponent, quant_type)
        assert_bits(scaled[0], codes)
        assert_bits(scaled[1], absmax * 2.0**exponent)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=150), quant_type=st.sampled_from(TYPES))
def test_any_floats(values: list[float], quant_type: str):
    before = octavo._C.isa()
    try:
        for level in octavo._C.available_isas():
            octavo._C.set_isa(level)
            check(torch.ops.octavo, torch.tensor(values), quant_type, 32)
    finally:
        octavo._C.set_isa(before)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=150),
    quant_type=st.sampled_from(TYPES),
)
def test_quantizing_again_changes_nothing(values: list[float], quant_type: str):
    """Every value of a code book is its own code, whatever the scale, as long as the block has an end of the book."""
    once = octavo.quantize_4bit(torch.tensor(values), quant_type, 32)
    back = once.dequantize(torch.float32)
    again = octavo.quantize_4bit(back, quant_type, 32).dequantize(torch.float32)
    for block, absmax in enumerate(once.absmax.tolist()):
        part = slice(32 * block, 32 * (block + 1))
        assert not bool((back[part].abs() == absmax).any()) or torch.equal(again[part], back[part])


# ---- layout ----------------------------------------------------------------------------------------------------------


def test_the_even_element_is_the_upper_half_of_a_byte(ops: Ops):
    """bitsandbytes' order; of an odd number the last half byte is the code of 0."""
    book = reference.code_book("nf4")
    packed, absmax = check(ops, book[[15, 0, 7, 9, 3]])
    assert packed.tolist() == [0xF0, 0x79, 0x37]
    assert absmax.tolist() == [1.0]
    assert check(ops, reference.code_book("fp4")[[3, 11, 6]], "fp4")[0].tolist() == [0x3B, 0x60]


def test_codes_of_2_3_and_8_bits_leave_no_gaps(ops: Ops):
    assert check(ops, reference.code_book("nf2")[[3, 0, 1, 2, 3]], "nf2")[0].tolist() == [0b11000110, 0b11000000]
    three = check(ops, reference.code_book("nf3")[[7, 0, 5, 1, 2, 6, 3, 4, 7]], "nf3")[0]
    assert three.tolist() == [0b11100010, 0b10010101, 0b10011100, 0b11100000]
    assert check(ops, reference.code_book("nf8")[[255, 0, 127, 128]], "nf8")[0].tolist() == [255, 0, 127, 128]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (1,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_any_rank_and_empty(ops: Ops, quant_type: str, shape: tuple[int, ...]):
    check(ops, torch.full(shape, -2.5), quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
def test_views(ops: Ops, quant_type: str, generator: torch.Generator):
    base = torch.randn(40, 66, generator=generator)
    for view in (base.t(), base[::2, 1::3], base[:, 5:], base[3:4].expand(4, 66), base.view(2, 20, 66)):
        check(ops, view, quant_type)
    check(ops, torch.randn(1300, generator=generator).bfloat16()[1:], quant_type, 128)  # no 16-byte alignment
    packed, absmax = reference.nf4_quantize(base, quant_type)
    wide = torch.stack([packed, packed], 1)[:, 0]
    scale = torch.cat([torch.ones(1), absmax])[1:]
    arguments = (wide, scale, None, None, base.shape, torch.float32, quant_type)
    assert_bits(ops.nf4_dequantize(*arguments), reference.nf4_dequantize(*arguments))


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("columns", [48, 80, 96, 1152])
def test_rows_that_are_no_multiple_of_the_block(ops: Ops, columns: int, quant_type: str, generator: torch.Generator):
    """bitsandbytes 0.50 takes absmax row by row there, and its AVX-512 dequantization returns another weight."""
    blocksize = 256 if columns == 1152 else 64
    rows = 8 if columns == 1152 or ops.backend.startswith("simt") else 64
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 4, rows)[:, None]
    packed, absmax = check(ops, x, quant_type, blocksize)
    back = ops.nf4_dequantize(packed, absmax, None, None, x.shape, torch.float32, quant_type, blocksize)
    scale = absmax.repeat_interleave(blocksize)[: x.numel()].view_as(x)
    widest = reference.code_book(quant_type).sort().values.diff().max()
    assert bool(((back - x).abs() <= scale * widest / 2 * 1.001).all())


def test_threads_do_not_change_bits(generator: torch.Generator):
    x = torch.randn((1 << 20) + 7, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            packed, absmax = octavo.ops.nf4_quantize(x, "nf3", 128)
            back = octavo.ops.nf4_dequantize(packed, absmax, None, None, x.shape, torch.bfloat16, "nf3", 128)
            results.append((packed, absmax, back))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert_bits(one, two)


# ---- errors ----------------------------------------------------------------------------------------------------------

ONES = torch.ones(100)
PACKED, ABSMAX = torch.zeros(50, dtype=torch.uint8), torch.ones(2)
CODES, NESTED, OFFSET = torch.zeros(2, dtype=torch.uint8), torch.ones(1), torch.zeros(1)
F32 = torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.nf4_quantize(ONES.double()), "x must be float32, float16 or bfloat16, got float64"),
        (lambda o: o.nf4_quantize(ONES.int()), "got int32"),
        (lambda o: o.nf4_quantize(ONES, "int4"), "quant_type must be 'nf2', .* or 'fp4', got 'int4'"),
        (lambda o: o.nf4_quantize(ONES, "nf4", 100), "blocksize must be a power of two from 32 to 4096, got 100"),
        (lambda o: o.nf4_quantize(ONES, "nf4", 16), "got 16"),
        (lambda o: o.nf4_quantize(ONES, "nf4", 8192), "got 8192"),
        (lambda o: o.nf4_quantize(ONES, "nf4", 0), "got 0"),
        (lambda o: o.nf4_quantize(ONES, "nf4", -64), "got -64"),
        (lambda o: o.nf4_dequantize(PACKED[:49], ABSMAX, None, None, (100,), F32), r"packed .*\[50\] .*got \[49\]"),
        (lambda o: o.nf4_dequantize(PACKED[None], ABSMAX, None, None, (100,), F32), r"packed .*got \[1, 50\]"),
        (lambda o: o.nf4_dequantize(PACKED.int(), ABSMAX, None, None, (100,), F32), "packed must be uint8, got int32"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX[:1], None, None, (100,), F32), r"absmax .*\[2\] .*got \[1\]"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX.half(), None, None, (100,), F32), "absmax must be .*got float16"),
        (lambda o: o.nf4_dequantize(PACKED, CODES, None, None, (100,), F32), "absmax must be float32, got uint8"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, NESTED, OFFSET, (100,), F32), "absmax must be uint8, got float32"),
        (lambda o: o.nf4_dequantize(PACKED, CODES, NESTED, None, (100,), F32), "go together, got only nested_absmax"),
        (lambda o: o.nf4_dequantize(PACKED, CODES, None, OFFSET, (100,), F32), "go together, got only offset"),
        (lambda o: o.nf4_dequantize(PACKED, CODES, ABSMAX, OFFSET, (100,), F32), r"nested_absmax .*\[1\].*got \[2\]"),
        (lambda o: o.nf4_dequantize(PACKED, CODES, NESTED, ABSMAX, (100,), F32), r"offset .*\[1\].*got \[2\]"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, None, None, (-100, -1), F32), "must not be negative, got -100"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, None, None, (2**62, 4), F32), "more elements than memory"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, None, None, (100,), torch.int8), "dtype must be .*got int8"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, None, None, (100,), F32, "nf5"), "got 'nf5'"),
        (lambda o: o.nf4_dequantize(PACKED, ABSMAX, None, None, (100,), F32, "nf3"), r"packed must have shape \[38\]"),
    ],
)
def test_errors_name_the_values(ops: Ops, call: Any, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4",), "quant_type must be one of nf2, nf3, nf4, nf8, fp4, got 'int4'"),
        (("nf4", 100), "blocksize must be a power of two from 32 to 4096, got 100"),
        (("nf4", True), "got True"),
        (("nf4", 64.0), "got 64.0"),
    ],
)
def test_quantize_4bit_refuses(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        octavo.quantize_4bit(ONES, *arguments)
