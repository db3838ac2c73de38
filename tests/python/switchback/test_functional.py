"""Gradients of `switchback_linear` against float64, with the noise that int8 must have as tolerance.

Codes are off by up to half a scale, evenly: by scale**2 / 12 in the mean square. With scales s_i of a's rows and t_j of
b's, output ij of a @ b.T has the variance ``(s_i**2 * |b_j|**2 + t_j**2 * |a_i|**2) / 12``, and is never off by more
than ``(s_i * (|b_j|_1 + t_j * k / 2) + t_j * |a_i|_1) / 2``.
"""

from __future__ import annotations

import math

import octavo
import pytest
import torch
from compare import FLOATS
from octavo.switchback.functional import INT8_VARIANTS, VARIANTS, _rows_and_columns
from torch import Tensor
from torch.nn import functional as F

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# tokens, n, k: widths of 64 to 4096 and 16 to 8192 tokens; 576 and 1000 are no multiples of a tile.
SIZES = [(16, 64, 64), (8192, 64, 256), (300, 1000, 576), (512, 1280, 5120), (16, 4096, 4096), (2048, 1024, 4096)]
SAMPLED = 48  # rows of each product that are compared


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def row_scale(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True) / 127


def tensor_scale(x: Tensor) -> Tensor:
    return (x.abs().amax() / 127).expand(x.shape[0], 1)


def assert_within_noise(
    got: Tensor, a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, dtype: torch.dtype
) -> None:
    """`got`, in `dtype`, is ``a @ b.T`` of float64 operands with the noise of codes of these scales; None: no codes."""
    none = torch.zeros((), dtype=torch.float64)
    s = none if a_scale is None else a_scale
    t = none if b_scale is None else b_scale.t()
    exact = a @ b.t()
    error = got.double() - exact
    sums = a.abs() @ b.abs().t()
    roundoff = (3 * ROUNDOFF[dtype] + a.shape[1] * 2.0**-23) * sums + torch.finfo(dtype).smallest_normal
    most = (s * (b.abs().sum(1) + t * a.shape[1] / 2) + t * a.abs().sum(1, keepdim=True)) / 2
    assert bool((error.abs() <= most + roundoff).all())
    if a_scale is None and b_scale is None:  # fp32 sums of many products: the bound says enough
        return
    variance = (s**2 * b.square().sum(1) + t**2 * a.square().sum(1, keepdim=True)) / 12
    # A rounding of 16 bits is off by up to 1 unit, by a third of it in the mean square; operands add their own.
    rounding = (ROUNDOFF[dtype] ** 2 * (exact**2 + 2 * (a**2 @ (b**2).t()))).mean() / 3
    wanted, found = (variance.mean() + rounding).item(), error.square().mean().item()
    slack = 1.15 + 3 / math.sqrt(min(error.shape))  # errors of one row or column share a scale
    assert found <= slack * wanted, f"mean square error {found:.3g}, {found / wanted:.2f} of what int8 explains"
    assert found >= wanted / 3, "nothing was quantized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_products_have_the_noise_of_int8(variant: str, size: tuple[int, int, int], dtype: torch.dtype):
    m, n, k = size
    x = (torch.randn(m, k) * torch.rand(m, 1).exp()).to(dtype).requires_grad_()
    weight = (torch.randn(n, k) / k**0.5).to(dtype).requires_grad_()
    grad = torch.randn(m, n).to(dtype)
    out = octavo.switchback_linear(x, weight, None, variant)
    out.backward(grad)
    assert out.dtype is dtype and x.grad.dtype is dtype and weight.grad.dtype is dtype
    chosen = lambda rows: torch.randperm(rows)[:SAMPLED].sort().values  # noqa: E731
    X, W, G = (t.detach().double() for t in (x, weight, grad))
    tensorwise = INT8_VARIANTS[variant].tensorwise

    rows = chosen(m)
    of_rows = tensor_scale(W) if tensorwise else row_scale(W)
    assert_within_noise(out.detach()[rows], X[rows], W, row_scale(X[rows]), of_rows, dtype)
    of_columns = tensor_scale(W)[:1].expand(k, 1) if tensorwise else row_scale(W.t())
    assert_within_noise(x.grad[rows], G[rows], W.t(), row_scale(G[rows]), of_columns, dtype)

    rows = chosen(n)
    G_t, X_t = G.t()[rows], X.t()
    keeps = INT8_VARIANTS[variant].keeps
    if keeps == "columns":
        assert_within_noise(weight.grad[rows], G_t, X_t, row_scale(G_t), row_scale(X_t), dtype)
    elif keeps == "codes":  # a scale for each term of the sum
        exact = G_t @ X_t.t()
        variance = (G_t**2) @ (row_scale(X) ** 2 / 12)
        rounding = (ROUNDOFF[dtype] ** 2 * (exact**2 + 2 * (G_t**2 @ (X_t**2).t()))).mean() / 3
        found = (weight.grad[rows].double() - exact).square().mean()
        wanted = variance.mean() + rounding
        assert wanted / 3 <= found <= (1.15 + 3 / math.sqrt(min(SAMPLED, k))) * wanted
    else:
        assert_within_noise(weight.grad[rows], G_t, X_t, None, None, dtype)


def fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to values of an fp8 format after scaling by its range, in float64: for the test, from its definition."""
    mantissa, least, most = {torch.float8_e4m3fn: (3, -6, 448.0), torch.float8_e5m2: (2, -14, 57344.0)}[dtype]
    scale = x.abs().max() / most
    values = x / scale
    exponent = values.abs().clamp(min=2.0**least).log2().floor()
    unit = torch.exp2(exponent - mantissa)
    return torch.round(values / unit) * unit * scale


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_rounds_every_operand(dtype: torch.dtype):
    x = (torch.randn(3, 40, 64) * 3).to(dtype).requires_grad_()
    weight, bias = torch.randn(96, 64, requires_grad=True), torch.randn(96, requires_grad=True)
    grad = torch.randn(3, 40, 96).to(dtype)
    out = octavo.switchback.fp8_linear(x, weight, bias)
    out.backward(grad)
    X, G = (
        fp8(x.detach().double().view(-1, 64), torch.float8_e4m3fn),
        fp8(grad.double().view(-1, 96), torch.float8_e5m2),
    )
    W = fp8(weight.detach().double(), torch.float8_e4m3fn)
    # A value at a midpoint may go the other way, for the scale is fp32 there: few, and rounding itself is 0.03 to 0.06.
    for got, want in (
        (out.detach().view(-1, 96), X @ W.t() + bias.detach().double()),
        (x.grad.view(-1, 64), G @ W),
        (weight.grad, G.t() @ X),
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < 2 * ROUNDOFF[dtype] + 3e-3
    assert torch.equal(bias.grad, grad.view(-1, 96).float().sum(0))
    assert (out.detach().double() - F.linear(x.detach().double(), weight.detach().double())).norm() > 0.01


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-32, 1e-25])
def test_fp8_of_tiny_tensors(size: float):
    """Below 2**-100 a tensor counts as zero; nothing becomes NaN."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    grad = torch.randn(3, 4)
    octavo.switchback.fp8_linear(x, weight).backward(grad * size)
    for got, want in ((x.grad, grad @ weight.detach()), (weight.grad, grad.t() @ x.detach())):
        assert got.isfinite().all()
        assert (got == 0).all() if size < 2.0**-100 else (got / size - want).norm() < 0.2 * want.norm()
    x = x.detach() * 1e25
    x[1] = 0
    assert (octavo.switchback.fp8_linear(x, weight * 1e20)[1] == 0).all()  # the product of the scales is out of range
    x = x / 1e25
    half = octavo.switchback.fp8_linear((x * 1e-4).half(), weight * 1e5)  # so is the weight, of fp16
    assert (half.float() - 10 * octavo.switchback.fp8_linear(x, weight)).abs().max() < 1.0
    out = octavo.switchback.fp8_linear(x * size, weight)
    assert out.isfinite().all() and bool((out == 0).all()) == (size < 2.0**-100)


# ---- what all variants share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7), (2, 0, 7)], ids=str)
def test_leading_dimensions(variant: str, shape: tuple[int, ...]):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(5, 7, requires_grad=True), torch.randn(5, requires_grad=True)
    out = octavo.switchback_linear(x, weight, bias, variant)
    assert out.shape == (*shape[:-1], 5)
    out.sum().backward()
    want = [t.detach().requires_grad_() for t in (x, weight, bias)]
    F.linear(*want).sum().backward()
    for got, exact in zip((x, weight, bias), want, strict=True):
        assert got.grad.shape == exact.grad.shape
        assert (got.grad - exact.grad).norm() <= 0.1 * exact.grad.norm()


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_zero_rows_and_nan_rows(variant: str):
    x = torch.randn(4, 6)
    x[1], x[2, 3] = 0, math.nan
    x.requires_grad_()
    weight, bias = torch.randn(5, 6, requires_grad=True), torch.randn(5)
    out = octavo.switchback_linear(x, weight, bias, variant)
    assert torch.equal(out[1], bias) and out[2].isnan().all() and out[[0, 3]].isfinite().all()
    grad = torch.randn(4, 5)
    grad[0] = 0
    out.backward(grad)
    assert (x.grad[0] == 0).all() and x.grad.isfinite().all()
    columns = slice(3, 4) if variant != "memory_efficient" else slice(None)  # of which the codes know the row only
    assert weight.grad[:, columns].isnan().all()
    kept = [0, 1, 2, 4, 5]
    assert variant == "memory_efficient" or weight.grad[:, kept].isfinite().all()
    x.grad = None
    grad[3, 1] = math.inf
    octavo.switchback_linear(x, weight, bias, variant).backward(grad)
    assert x.grad[3].isnan().all() and x.grad[:3].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_in_the_weight(variant: str):
    weight = torch.randn(5, 6)
    weight[2, 1] = math.nan
    x = torch.randn(4, 6, requires_grad=True)
    out = octavo.switchback_linear(x, weight, None, variant)
    alone = variant != "fp8" and not INT8_VARIANTS[variant].tensorwise
    assert out[:, 2].isnan().all()
    assert bool(out[:, [0, 1, 3, 4]].isfinite().all()) == alone and bool(out[:, 0].isnan().all()) != alone
    out.backward(torch.ones(4, 5))
    assert x.grad[:, 1].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)], ids=["x", "weight", "neither"])
def test_only_what_needs_a_gradient_is_kept(variant: str, need: tuple[bool, bool]):
    x, weight = torch.randn(8, 6, requires_grad=need[0]), torch.randn(5, 6, requires_grad=need[1])
    bias = torch.randn(5, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = octavo.switchback_linear(x, weight, bias, variant)
    if variant != "fp8":
        kept = {tuple(t.shape) for t in saved if t.dtype in (torch.int8, torch.float32) and t.dim() == 2}
        assert ((6, 5) in kept) == need[0]
        assert (((8, 6) in kept) or ((6, 8) in kept)) == need[1]
        if variant in ("memory_efficient", "all_int8"):
            assert all(t.dtype is torch.int8 for t in saved if t.dim() == 2)
    out.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == need
    assert torch.equal(bias.grad, torch.full((5,), 8.0))


def test_memory_of_activations():
    """memory_efficient keeps a byte an element of x, and 4 a row."""
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32, 256, requires_grad=True)
    sizes = {}
    for variant in INT8_VARIANTS:
        bytes_kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            octavo.switchback_linear(x, weight, None, variant)
        sizes[variant] = bytes_kept - 32 * 256  # without the transposed weight
    assert sizes["switchback"] == x.nbytes + 4
    assert sizes["memory_efficient"] == x.numel() + 64 * 4 + 4
    assert sizes["vectorwise"] == x.nbytes + 256 * 4
    assert sizes["all_int8"] == x.numel() + 256 * 4 + 256 * 4


# ---- int8 weight gradients -------------------------------------------------------------------------------------------


def weight_grad(x: Tensor, grad: Tensor, **options: object) -> Tensor:
    weight = torch.zeros(grad.shape[1], x.shape[1], requires_grad=True)
    octavo.switchback_linear(x, weight, None, "all_int8", **options).backward(grad)
    return weight.grad.double()


def test_k_split_confines_outliers():
    x, grad = torch.randn(512, 64), torch.randn(512, 32)
    x[:16] *= 100  # they alone decide the scales of all columns, or of their part
    exact = grad.double().t() @ x.double()
    whole = (weight_grad(x, grad) - exact).square().mean()
    parts = (weight_grad(x, grad, k_split=64) - exact).square().mean()
    assert parts < whole / 3
    for size in (1, 100, 511, 512, 10**6):  # parts that do not divide the rows, too
        assert (weight_grad(x, grad, k_split=size) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("k_split", [None, 40])
def test_stochastic_rounding_is_right_in_the_mean(k_split: int | None):
    x, grad = torch.randn(128, 24).sigmoid(), torch.randn(128, 16).sigmoid()  # errors of one sign add up
    x[:, :8] = 0.4037  # a constant column has one code, off by as much in every row
    x[0] = 1.0
    exact = grad.double().t() @ x.double()
    torch.manual_seed(1)
    draws = torch.stack([weight_grad(x, grad, k_split=k_split, stochastic_rounding=True) for _ in range(200)])
    assert len({draw.numpy().tobytes() for draw in draws}) == 200
    nearest = (weight_grad(x, grad, k_split=k_split) - exact)[:, :8].abs().mean()
    assert (draws.mean(0) - exact)[:, :8].abs().mean() < nearest / 3
    torch.manual_seed(1)
    assert torch.equal(weight_grad(x, grad, k_split=k_split, stochastic_rounding=True), draws[0])


def test_parts_are_rounded_apart():
    """Equal rows in two parts draw other numbers: else their errors would add up."""
    half = torch.rand(40, 24)
    _, (first, _, second, _) = _rows_and_columns(half.repeat(2, 1), 40, stochastic=True, with_rows=False)
    assert first.shape == (24, 40) and (first != second).float().mean() > 0.2
    _, (first, _, second, _) = _rows_and_columns(half.repeat(2, 1), 40, stochastic=False, with_rows=False)
    assert torch.equal(first, second)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_values():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="unknown variant 'int4'; known: switchback, memory_efficient"):
        octavo.switchback_linear(x, weight, None, "int4")
    with pytest.raises(ValueError, match="k_split is of the weight gradient in int8, of variant all_int8; the variant"):
        octavo.switchback_linear(x, weight, k_split=4)
    with pytest.raises(ValueError, match="stochastic_rounding is of the weight gradient"):
        octavo.switchback_linear(x, weight, variant="vectorwise", stochastic_rounding=True)
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"k_split must be a positive number of rows, got {size}"):
            octavo.switchback_linear(x, weight, variant="all_int8", k_split=size)
    for name in ("switchback_linear", "fp8_linear"):
        call = getattr(octavo, name)
        with pytest.raises(RuntimeError, match=f"{name}: x must be float32, float16 or bfloat16, got float64"):
            call(x.double(), weight)
        with pytest.raises(RuntimeError, match=f"{name}: weight must be float32, float16 or bfloat16, got int8"):
            call(x, weight.to(torch.int8))
        with pytest.raises(
            RuntimeError, match=r"x of shape \[3, 4\] and weight of shape \[4, 5\] do not make a product"
        ):
            call(x, weight.t())
        with pytest.raises(RuntimeError, match=r"x of shape \[\] and weight"):
            call(torch.tensor(1.0), weight)
        for bias in (torch.zeros(4), torch.zeros(3, 1), torch.zeros(5).double(), torch.zeros(5).long()):
            with pytest.raises(RuntimeError, match=rf"{name}: bias must be float32, float16 or bfloat16 \[5\], got"):
                call(x, weight, bias)
    quantized = octavo.switchback.switchback_weight(torch.randn(7, 4))
    with pytest.raises(RuntimeError, match=r"quantized is of a weight of shape \[7, 4\], not of \[5, 4\]"):
        octavo.switchback_linear(x, weight, quantized=quantized)
    with pytest.raises(ValueError, match="variant fp8 is a simulation: it takes no quantized weight"):
        octavo.switchback_linear(x, weight, variant="fp8", quantized=quantized)
    with pytest.raises(ValueError, match="variant fp8 is a simulation: there is no int8 weight"):
        octavo.switchback.switchback_weight(weight, "fp8")
    with pytest.raises(ValueError, match="unknown variant 'nope'"):
        octavo.switchback.switchback_weight(weight, "nope")
    with pytest.raises(ValueError, match=r"must be a matrix \[n, k\], got shape \[1, 5, 4\]"):
        octavo.switchback.switchback_weight(weight[None])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_derivative_is_an_error(variant: str):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = octavo.switchback_linear(x, weight, None, variant)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("variant", ["switchback", "vectorwise"])
def test_changing_x_before_backward_is_an_error(variant: str):
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    out = octavo.switchback_linear(x, weight, None, variant)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
