"""SpQR's quantization of one weight: the compiled loop has the bits of plain PyTorch; what it makes of data."""

import functools
import itertools
import math

import pytest
import torch
from compare import assert_same
from octavo import _C, reference
from octavo.spqr import Hessian, SpQRConfig, SpQRWeight, factorize, quantize_weight
from spqr_paper import paper_engine

NAMES = ("codes", "scales", "zeros", "second_order", "residual", "error")


def upper_factor(k, generator, tokens=200):
    """Of the inverse of a damped Hessian of correlated inputs."""
    x = torch.randn(tokens, k, generator=generator) @ (torch.eye(k) + 0.1 * torch.randn(k, k, generator=generator))
    hessian = 2 / tokens * x.T @ x
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(k)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def difficult_weight(n, k, group_size, generator):
    """Random rows with heavy tails, then, as far as there are rows, those that hide bugs."""
    w = torch.randn(n, k, generator=generator) * 100
    w[torch.rand(n, k, generator=generator) < 0.01] *= 20
    fill = [
        lambda r: r.zero_(),
        lambda r: r.fill_(7.0),
        lambda r: r.fill_(-7.3),
        lambda r: r.copy_(torch.arange(k) % 4),  # ties of the least and the largest
        lambda r: r.copy_((torch.arange(k) % 2).float().mul(-3.0)),
        lambda r: r[: k // 2].fill_(0.0),
        lambda r: r[:1].fill_(3000.0),  # one weight far out
        lambda r: r.copy_(1000.0 + torch.arange(k) * 0.01),  # far from 0
        lambda r: r.copy_(-1000.0 - torch.arange(k) * 0.01),
        lambda r: r.mul_(1e-7),
        lambda r: r.mul_(1e-30),
        lambda r: r.fill_(-0.0),
    ]
    for i, change in enumerate(fill):
        if 3 * i + 1 < n:
            change(w[3 * i + 1])
    return w


def assert_all_same(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        try:
            assert_same(a, e)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


CASES = [
    (bits, group_size, stats, second, threshold)
    for (bits, second), (group_size, stats), threshold in itertools.product(
        [(2, (3, 3)), (3, (3, 3)), (4, (4, 4)), (3, (0, 0))],
        [(16, 16), (32, 48)],
        [float("inf"), 3000.0],
    )
]


@pytest.mark.parametrize(("bits", "group_size", "stats", "second", "threshold"), CASES)
def test_columns_equal_plain_pytorch(ops, generator, bits, group_size, stats, second, threshold):
    n, k = 51, 64
    w = difficult_weight(n, k, group_size, generator)
    arguments = (w, upper_factor(k, generator), threshold, bits, group_size, stats, *second)
    expected = reference.spqr_quantize_columns(*arguments)
    assert_all_same(ops.spqr_quantize_columns(*arguments), expected)
    if threshold < float("inf"):
        assert 0 < (expected[4] != 0).float().mean() < 0.8
    assert all(t.isfinite().all() for t in expected)


@pytest.mark.parametrize("second", [(0, 0), (3, 3)])
@pytest.mark.parametrize("threshold", [float("inf"), 0.3])
@pytest.mark.parametrize("large", [6e6, 1e12, 1e20, 1e26, 1e38, float("inf"), float("nan")])
def test_columns_beyond_fp16_have_errors_that_are_not_finite(ops, generator, large, threshold, second):
    """The row that exceeds fp16 says so, and the tiles that it is not in are as if it were not there."""
    w, factor = torch.randn(48, 16, generator=generator), upper_factor(16, generator)
    w[20, ::2] = large
    w[20, 5] = -large
    arguments = (factor, threshold, 3, 16, 16, *second)
    results = ops.spqr_quantize_columns(w, *arguments)
    error = results[-1]
    assert not error[20].isfinite().all()
    assert not reference.spqr_quantize_columns(w, *arguments)[-1][20].isfinite().all()
    w[20] = 0.0
    for got, expected in zip(results, reference.spqr_quantize_columns(w, *arguments), strict=True):
        tile = len(got) // 3
        assert torch.equal(got[:tile], expected[:tile]) and torch.equal(got[2 * tile :], expected[2 * tile :])


def test_many_rows_on_two_threads(generator):
    """Tiles are independent: threads change nothing."""
    w, factor = torch.randn(1000, 128, generator=generator) * 100, upper_factor(128, generator)
    arguments = (w, factor, 2000.0, 3, 16, 16, 3, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = torch.ops.octavo.spqr_quantize_columns(*arguments)
        torch.set_num_threads(2)
        assert_all_same(torch.ops.octavo.spqr_quantize_columns(*arguments), expected)
    finally:
        torch.set_num_threads(threads)


def test_column_arguments_are_checked(ops):
    w, eye = torch.zeros(4, 32), torch.eye(32)
    for arguments, message in (
        ((w.half(), eye, 1.0, 3, 16), "weight must be float32, got float16"),
        ((w, eye, 1.0, 9, 16), "bits must be 1 to 8, got 9"),
        ((w, eye, 1.0, 3, 24), r"multiple of group_size 24 columns, at most 128, got shape \[4, 32\]"),
        ((w, eye, 1.0, 3, 16, 24), "stats_group_size must be a multiple of 16 up to 1024, got 24"),
        ((w, eye, 1.0, 3, 16, 16, 3, 0), "both 0, or both at least 1 and together at most 8, got 3 and 0"),
        ((w, eye, 1.0, 3, 16, 16, 5, 4), "together at most 8, got 5 and 4"),
        ((w, eye, float("nan"), 3, 16), "threshold must be 0 or positive"),
        ((w, eye[:16], 1.0, 3, 16), r"factor must have shape \[32, 32\], got \[16, 32\]"),
        ((w, -eye, 1.0, 3, 16), "diagonal of factor must be positive, got -1 at 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.spqr_quantize_columns(*arguments)


# ---- one weight ----------------------------------------------------------------------------------------------------


def calibration(k, generator, tokens=600, large=6):
    """Correlated inputs, a few features of which are 20 times as large as the others."""
    x = torch.randn(tokens, k, generator=generator)
    x = x @ (torch.eye(k) + torch.randn(k, k, generator=generator) * (0.5 / k**0.5))
    x[:, torch.randperm(k, generator=generator)[:large]] *= 20
    return x


def hessian_of(x):
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian.matrix


def layer(n, k, generator, tails=0.002, **options):
    w = torch.randn(n, k, generator=generator) * 0.02
    w[torch.rand(n, k, generator=generator) < tails] *= 10
    return w, calibration(k, generator, **options)


def assert_codes_same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert_same(value, other)
        else:
            assert value == other or value != value, name  # NaN: no Hessian


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "plain PyTorch"])
@pytest.mark.parametrize(
    "config",
    [
        SpQRConfig(3, 16, 32),
        SpQRConfig(2, 32, 16, act_order=False, tau=0.05),
        SpQRConfig(4, 64, 64, scale_bits=4, zero_bits=4, outlier_fraction=0.02),
        SpQRConfig.gptq(3, 64),
        SpQRConfig.rtn(4, 16),
    ],
    ids=str,
)
def test_weights_have_the_same_bits_on_every_level(generator, isa, config):
    w, x = layer(39, 192, generator)
    hessian = hessian_of(x)
    expected = quantize_weight(w, hessian, config)
    if isa == "plain PyTorch":
        assert_codes_same(quantize_weight(w, hessian, config, columns=reference.spqr_quantize_columns), expected)
        return
    if isa not in _C.build_info()["isa"]:
        pytest.skip(f"this machine or build has no {isa}")
    before = _C.isa()
    try:
        _C.set_isa(isa)
        assert_codes_same(quantize_weight(w, hessian, config), expected)
    finally:
        _C.set_isa(before)
    packed = SpQRWeight.pack(expected)
    assert packed.validate() == []
    assert_same(packed.dequantize(), expected.dequantize())
    assert packed.nominal_bits == pytest.approx(expected.nominal_bits)


def output_error(w, quantized, x):
    return float((x @ (w - quantized).T).norm() / (x @ w.T).norm())


def test_errors_are_those_of_the_paper_engine(generator):
    """A layer with heavy tails: each method in its place, and each within 3 % of the engine of the paper, which keeps
    statistics and outliers in fp32. The search for likely outliers differs where all weights of a group are."""
    w, x = layer(512, 512, generator, tokens=2048)
    hessian = hessian_of(x)
    recipe = functools.partial(SpQRConfig, damping=1.0)  # the paper's

    def error(config):
        codes = quantize_weight(w, hessian, config)
        found = output_error(w, codes.dequantize(), x)
        assert codes.error == pytest.approx(found, rel=1e-3)
        return found, codes

    rtn128, rtn16 = error(SpQRConfig.rtn(3, 128))[0], error(SpQRConfig.rtn(3, 16))[0]
    gptq, plain = error(SpQRConfig.gptq(3, 128))[0], error(recipe(3, tau=math.inf))[0]
    with_outliers = {tau: error(recipe(3, tau=tau)) for tau in (0.5, 0.2, 0.1)}
    four = error(recipe(4))[0]
    assert 0.25 < rtn128 < 0.35
    assert 0.12 < rtn16 < 0.18
    assert 0.18 < gptq < 0.26
    assert rtn128 > gptq > rtn16 > plain > with_outliers[0.5][0] > with_outliers[0.2][0] > with_outliers[0.1][0] > four
    assert with_outliers[0.2][0] < 0.5 * plain
    assert error(recipe(3, leave_one_out=False))[0] > with_outliers[0.2][0]

    assert error(SpQRConfig(3, tau=0.2))[0] < with_outliers[0.2][0]  # the default damping is less
    cases = [(gptq, (3, 128, math.inf, False, 0.01, True)), (plain, (3, 16, math.inf, True, 1.0, True))]
    for found, arguments in cases:
        assert found == pytest.approx(output_error(w, paper_engine(w, hessian, *arguments)[0], x), rel=0.03)
    quantized, share = paper_engine(w, hessian, 3, 16, 0.2, True, 1.0, True)
    found, codes = with_outliers[0.2]
    assert found == pytest.approx(output_error(w, quantized, x), rel=0.03)
    assert codes.outlier_share == pytest.approx(share, rel=0.1)


def test_gptq_with_the_identity_is_round_to_nearest(generator):
    w, _ = layer(40, 256, generator)
    config = SpQRConfig.gptq(3, 64, act_order=False, damping=0.0)
    exact = quantize_weight(w, torch.eye(256), config)
    assert_same(exact.dequantize(), quantize_weight(w, None, SpQRConfig.rtn(3, 64)).dequantize())


def test_nearest_code_of_every_group(generator):
    """Round to nearest by another route: fp64, no unit, no transposing."""
    w, _ = layer(40, 128, generator)
    codes = quantize_weight(w, None, SpQRConfig.rtn(4, 64))
    groups = w.double().view(40, 2, 64)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert float(((codes.dequantize().double().view(40, 2, 64) - groups).abs() / step[..., None]).max()) < 0.51


def test_constant_groups_and_identical_rows_survive(generator):
    w = torch.randn(32, 64, generator=generator)
    w[:16] = w[0]  # 16 rows with the same statistics
    w[16:, 16:32] = torch.tensor([2.0, -0.75]).repeat(8)[:, None]
    w[20] = 0.0
    for config in (SpQRConfig.rtn(3, 16), SpQRConfig(3, propagate=False, tau=math.inf, scale_bits=4, zero_bits=4)):
        out = quantize_weight(w, None, config).dequantize()
        plain = quantize_weight(w[:1].clone(), None, SpQRConfig.rtn(3, 16)).dequantize()
        assert bool((out[:16] == out[0]).all())
        assert float((out[0] - plain[0]).abs().max()) < 0.02  # fp16 zero points of one and of two levels
        if not config.bilevel:
            assert torch.allclose(out[16:20, 16:32], w[16:20, 16:32], rtol=2.0**-11)
            assert not out[20].any()


def test_a_row_far_from_zero_spares_the_others(generator):
    """Its zero point would be 100 times as far out as theirs, and is what two levels cannot code together."""
    w = torch.randn(16, 32, generator=generator)
    config = SpQRConfig(4, propagate=False, act_order=False, tau=math.inf)
    alone = (quantize_weight(w, None, config).dequantize() - w).norm()
    w[5] = 50.0 + 0.5 * torch.randn(32, generator=generator)
    out = quantize_weight(w, None, config).dequantize() - w
    assert float(out[5].abs().max()) < 0.06 * 50
    out[5] = 0.0
    assert float(out.norm()) < 4 * float(alone)


def test_outliers_complete_the_dense_value(generator):
    """With tau 0 every weight that is not met exactly is an outlier, and what is left is the rounding to fp16."""
    w, x = layer(20, 64, generator)
    codes = quantize_weight(w, hessian_of(x), SpQRConfig(3, tau=0.0))
    assert codes.outlier_share > 0.9
    assert float((codes.dequantize() - w).abs().max()) < float(w.abs().max()) * 2.0**-10
    assert codes.error < 1e-3


@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.05])
def test_share_of_outliers_is_as_asked(generator, share):
    w, x = layer(600, 256, generator)
    codes = quantize_weight(w, hessian_of(x), SpQRConfig(3, outlier_fraction=share))
    assert codes.outlier_share == pytest.approx(share, rel=0.1)
    assert codes.nominal_bits == pytest.approx(3 + 6 / 16 + 64 / 256 + 32 * codes.outlier_share)
    again = quantize_weight(w, hessian_of(x), SpQRConfig(3, tau=codes.tau))
    assert_same(again.dequantize(), codes.dequantize())


@pytest.mark.parametrize("k", [32784, 65568])
def test_columns_beyond_16_bits(generator, k):
    """Round to nearest, so that no Hessian of this size is needed; outliers of the last columns are where they are."""
    w = torch.randn(3, k, generator=generator) * 0.01
    w[:, 5] = 1.0
    w[1, k - 1], w[2, k - 7] = 3.0, -2.0
    codes = quantize_weight(w, None, SpQRConfig(3, propagate=False, act_order=False, outlier_fraction=1e-3))
    out = codes.dequantize()
    assert out[1, k - 1] == pytest.approx(3.0, rel=1e-3)
    assert out[2, k - 7] == pytest.approx(-2.0, rel=1e-3)
    rows = torch.repeat_interleave(torch.arange(3), codes.row_offsets.long().diff())
    place = rows * k + codes.outlier_columns
    assert bool((place.diff() > 0).all())
    packed = SpQRWeight.pack(codes)
    assert packed.validate() == []
    assert_same(packed.dequantize(), out)


def test_dead_inputs_have_weights_of_nearly_zero(generator):
    """As near as their group's codes come to 0; with such weights kept, one of 2 would take the range of its group."""
    w, x = layer(16, 64, generator)
    x[:, [3, 40]] = 0.0
    w[:, [3, 40]] = 2.0
    codes = quantize_weight(w, hessian_of(x), SpQRConfig(3))
    assert float(codes.dequantize()[:, [3, 40]].abs().max()) < 0.02
    assert codes.error < 0.15


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-20, 2.0**30])
def test_scale_of_the_weight_does_not_matter(generator, scale):
    w, x = layer(16, 64, generator)
    small, large = (quantize_weight(v, hessian_of(x), SpQRConfig(3)) for v in (w, w * scale))
    assert_same(large.dequantize(), small.dequantize() * scale)


def test_dtypes(generator):
    w, x = layer(16, 64, generator)
    for dtype in (torch.bfloat16, torch.float16):
        half = w.to(dtype)
        expected = quantize_weight(half.float(), hessian_of(x), SpQRConfig(3))
        assert_codes_same(quantize_weight(half, hessian_of(x), SpQRConfig(3)), expected)


def test_hessian_is_the_mean_over_all_inputs(generator):
    x = torch.randn(50, 24, generator=generator)
    hessian = Hessian(24)
    hessian.add(x[:30].view(5, 6, 24))
    hessian.add(x[30:30])
    hessian.add(x[30:])
    assert hessian.count == 50
    torch.testing.assert_close(hessian.matrix, 2 / 50 * x.T @ x)
    upper = factorize(hessian.matrix, 0.5, False).upper.double()
    damped = hessian.matrix.double() / hessian.matrix.diagonal().mean() + 0.5 * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_bad_input_is_named(generator):
    w, x = layer(16, 64, generator)
    hessian = hessian_of(x)
    bad = w.clone()
    bad[2, 3] = math.nan
    with pytest.raises(ValueError, match="down: 1 of 1024 weights are NaN or Inf"):
        quantize_weight(bad, hessian, SpQRConfig(), "down")
    with pytest.raises(ValueError, match="group_size 128 does not divide the 64 columns; 16, 32, 64 would"):
        quantize_weight(w, hessian, SpQRConfig(group_size=128))
    with pytest.raises(ValueError, match="nor does any other"):
        quantize_weight(w[:, :60], hessian, SpQRConfig())
    with pytest.raises(ValueError, match="needs a Hessian"):
        quantize_weight(w, None, SpQRConfig())
    with pytest.raises(ValueError, match="of 64 inputs, the weight has 32"):
        quantize_weight(w[:, :32], hessian, SpQRConfig())
    with pytest.raises(ValueError, match="is 0: all calibration inputs"):
        quantize_weight(w, torch.zeros(64, 64), SpQRConfig())
    with pytest.raises(ValueError, match="4096 elements of the Hessian are NaN or Inf"):
        quantize_weight(w, hessian * math.nan, SpQRConfig())
    few = hessian_of(x[:8])
    with pytest.raises(ValueError, match="not positive definite with damping 0: give more damping"):
        quantize_weight(w, few, SpQRConfig(damping=0.0))
    assert quantize_weight(w, few, SpQRConfig()).error < 0.2
    x[5, 6] = math.inf
    with pytest.raises(ValueError, match="up: 1 of 38400 calibration inputs are NaN or Inf"):
        Hessian(64, name="up").add(x)
    with pytest.raises(ValueError, match=r"must have 64 features, got shape \[3, 5\]"):
        Hessian(64).add(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"group_size": 48}, "group_size must be one of 16, 32, 64, 128, got 48"),
        ({"stats_group_size": 8}, "stats_group_size must be a multiple of 16"),
        ({"scale_bits": 0}, "scale_bits must be 1 to 4"),
        ({"tau": -1.0}, "tau must be 0 or positive"),
        ({"tau": math.nan}, "tau must be 0 or positive"),
        ({"outlier_fraction": 0.9}, "outlier_fraction must be from 0 to 0.5, got 0.9"),
        ({"damping": math.inf}, "damping must be 0 or positive, and finite"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SpQRConfig(**settings)
