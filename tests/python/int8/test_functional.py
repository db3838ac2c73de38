"""Gradients of the differentiable functions, against float64 products of exactly the tensors that they stand for.

Bounds: a product of length n in fp32 is off by at most n * 2**-24 times the sum of the absolute products; a 16-bit
result and 16-bit factors add one unit roundoff each.
"""

import shutil

import octavo
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDOFF)


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """`got` is a @ b as its dtype can have it: two roundings of factors, one of the result, fp32 sums."""
    a, b = a.double(), b.double()
    tiny = torch.finfo(got.dtype).smallest_normal  # fp16 results may be denormal
    bound = (a.abs() @ b.abs()) * (3 * ROUNDOFF[got.dtype] + a.shape[-1] * 2.0**-23) + tiny
    error = (got.double() - a @ b).abs()
    assert got.shape == bound.shape
    assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


def quantized(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(n, k) * torch.logspace(-2, 0, n)[:, None]
    codes, scale = octavo.quantize_rowwise(weight)
    return weight, codes, scale


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double()[:, None]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "n", "k"), [((5,), 8, 16), ((2, 3), 33, 130), ((4,), 7, 2500), ((), 8, 16), ((1,), 16, 1024)]
)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_gradients(dtype, lead, n, k, threshold):
    _, codes, scale = quantized(n, k)
    x = torch.randn(*lead, k, dtype=dtype, requires_grad=True)
    bias = torch.randn(n, requires_grad=True)
    grad = torch.randn(*lead, n, dtype=dtype)
    out = octavo.int8_matmul(x, codes, scale, bias, threshold)
    assert out.shape == grad.shape
    assert out.dtype is dtype
    out.backward(grad)
    assert x.grad.dtype is dtype
    rows = grad.reshape(-1, n)
    assert_product(x.grad.reshape(-1, k), rows, dequantized(codes, scale))
    assert_product(bias.grad[None], torch.ones(1, len(rows)), rows)


def test_forward_is_the_op_with_and_without_gradients():
    _, codes, scale = quantized(9, 40)
    x, bias = torch.randn(6, 40), torch.randn(9)
    expected = octavo.ops.int8_linear(x, codes, scale, bias, 2.0)
    assert torch.equal(octavo.int8_matmul(x, codes, scale, bias, 2.0), expected)
    assert torch.equal(octavo.int8_matmul(x.requires_grad_(), codes, scale, bias, 2.0), expected)
    reference = octavo.reference.int8_linear(x, codes, scale, bias, 2.0)
    torch.testing.assert_close(expected.double(), reference.detach(), rtol=1e-5, atol=1e-5)


def test_default_threshold_is_the_papers():
    _, codes, scale = quantized(4, 16)
    x = torch.randn(3, 16)
    x[1, 5] = 60.0
    assert torch.equal(octavo.int8_matmul(x, codes, scale), octavo.ops.int8_linear(x, codes, scale, None, 6.0))
    assert not torch.equal(octavo.int8_matmul(x, codes, scale), octavo.ops.int8_linear(x, codes, scale, None, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_goes_through_kept_columns(dtype):
    weight, codes, scale = quantized(12, 20)
    columns = [3, 17]
    slot = torch.full((20,), -1, dtype=torch.int32)
    slot[columns] = torch.tensor([0, 1], dtype=torch.int32)
    x = torch.randn(5, 20, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 12, dtype=dtype)
    kept = weight[:, columns].t().contiguous()
    octavo.int8_matmul(x, codes, scale, None, 2.0, slot, kept).backward(grad)
    full = dequantized(codes, scale)
    full[:, columns] = weight[:, columns].double()
    assert_product(x.grad, grad, full)


def test_empty_batch_and_no_kept_columns():
    _, codes, scale = quantized(4, 16)
    x = torch.randn(0, 16, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    slot, kept = torch.full((16,), -1, dtype=torch.int32), torch.empty(0, 4)
    out = octavo.int8_matmul(x, codes, scale, bias, 6.0, slot, kept)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(bias.grad, torch.zeros(4))


def test_no_features():
    x = torch.randn(3, 0, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    out = octavo.int8_matmul(x, torch.zeros(4, 0, dtype=torch.int8), torch.zeros(4), bias)
    assert torch.equal(out, bias.expand(3, 4))
    out.sum().backward()
    assert x.grad.shape == (3, 0)
    assert torch.equal(bias.grad, torch.full((4,), 3.0))


def test_zero_and_nan_rows_stay_in_their_row():
    _, codes, scale = quantized(6, 32)
    x = torch.randn(4, 32)
    clean = octavo.int8_matmul(x, codes, scale)
    x[1], x[2, 7] = 0.0, torch.nan
    x.requires_grad_()
    out = octavo.int8_matmul(x, codes, scale)
    assert torch.equal(out[1], torch.zeros(6))
    assert bool(out[2].isnan().all())
    assert torch.equal(out[[0, 3]], clean[[0, 3]])
    grad = torch.randn(4, 6)
    grad[2] = torch.nan
    out.backward(grad)
    assert bool(x.grad[2].isnan().all())
    assert_product(x.grad[[0, 1, 3]], grad[[0, 1, 3]], dequantized(codes, scale))


def test_views_give_the_same_as_their_copies():
    _, codes, scale = quantized(8, 24)
    base = torch.randn(24, 10)
    grad = torch.randn(8, 10).t()
    strided, copied = base.t().requires_grad_(), base.t().contiguous().requires_grad_()
    octavo.int8_matmul(strided, codes, scale).backward(grad)
    octavo.int8_matmul(copied, codes, scale).backward(grad)
    assert torch.equal(strided.grad, copied.grad)


class _Largest(TorchDispatchMode):
    """The largest float tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


def test_backward_never_holds_the_dequantized_weight():
    _, codes, scale = quantized(64, 5000)
    x = torch.randn(2, 5000, requires_grad=True)
    out = octavo.int8_matmul(x, codes, scale)
    with _Largest() as largest:
        out.sum().backward()
    assert 0 < largest.numel <= 64 * 1024


@pytest.mark.parametrize(("x_grad", "bias_grad", "saved"), [(True, False, 2), (False, True, 0), (True, True, 2)])
def test_saves_only_what_it_needs(x_grad, bias_grad, saved):
    _, codes, scale = quantized(8, 16)
    x, bias = torch.randn(3, 16, requires_grad=x_grad), torch.randn(8, requires_grad=bias_grad)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        octavo.int8_matmul(x, codes, scale, bias).sum().backward()
    assert len(kept) == saved
    assert (x.grad is not None, bias.grad is not None) == (x_grad, bias_grad)


def test_autocast_casts_the_input():
    _, codes, scale = quantized(8, 32)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = octavo.int8_matmul(x, codes, scale)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, octavo.int8_matmul(x.bfloat16(), codes, scale))
    grad = torch.randn(4, 8, dtype=torch.bfloat16)
    out.backward(grad)
    assert x.grad.dtype is torch.float32
    assert_product(x.grad.bfloat16(), grad, dequantized(codes, scale))


def test_second_derivative_is_a_clear_error():
    _, codes, scale = quantized(8, 16)
    x = torch.randn(3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad((octavo.int8_matmul(x, codes, scale) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["weight_scale", "outlier_weight"])
def test_no_silent_missing_gradient(name):
    _, codes, scale = quantized(8, 16)
    slot, kept = torch.full((16,), -1, dtype=torch.int32), torch.randn(1, 8)
    (scale if name == "weight_scale" else kept).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        octavo.int8_matmul(torch.randn(2, 16), codes, scale, None, 6.0, slot, kept)


# ---- torch.compile -------------------------------------------------------------------------------------------------


def _gradients(function, x, weights):
    x = x.clone().requires_grad_()
    weights = [w.clone().requires_grad_() for w in weights]
    out = function(x, *weights)
    out.square().sum().backward()
    return out, x.grad, *[w.grad for w in weights]


def _compile_cases():
    _, codes, scale = quantized(8, 1100)  # more than one block of columns in the backward pass
    slot = torch.full((1100,), -1, dtype=torch.int32)
    slot[5] = 0
    kept = torch.randn(1, 8)
    return {
        "int8_matmul": (lambda x, b: octavo.int8_matmul(x, codes, scale, b, 2.0), [torch.randn(8)]),
        "kept": (lambda x, b: octavo.int8_matmul(x, codes, scale, b, 2.0, slot, kept), [torch.randn(8)]),
        "train": (lambda x, w, b: octavo.int8.int8_linear_train(x, w, b, 2.0), [torch.randn(8, 1100), torch.randn(8)]),
    }


@pytest.mark.parametrize("case", ["int8_matmul", "kept", "train"])
def test_compile_is_one_graph_for_every_batch_size(case):
    function, weights = _compile_cases()[case]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 7, 2):
        x = torch.randn(rows, 1100) * 2
        for got, expected in zip(_gradients(compiled, x, weights), _gradients(function, x, weights), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compile_with_inductor():
    function, weights = _compile_cases()["int8_matmul"]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    x = torch.randn(4, 1100) * 2
    for got, expected in zip(_gradients(compiled, x, weights), _gradients(function, x, weights), strict=True):
        torch.testing.assert_close(got, expected)


# ---- training with 16- and 32-bit weights --------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_train_gradients(weight_dtype, dtype, threshold):
    n, k = 24, 70
    x = torch.randn(2, 9, k, dtype=dtype, requires_grad=True)
    weight = torch.randn(n, k, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(n, requires_grad=True)
    grad = torch.randn(2, 9, n, dtype=dtype)
    out = octavo.int8.int8_linear_train(x, weight, bias, threshold)
    codes, scale = octavo.quantize_rowwise(weight.detach())
    assert torch.equal(out, octavo.ops.int8_linear(x, codes, scale, bias, threshold))
    out.backward(grad)
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, weight_dtype, torch.float32)
    rows = grad.reshape(-1, n)
    assert_product(x.grad.reshape(-1, k), rows, weight.detach())  # the true weight, not its codes
    coarser = max(dtype, weight_dtype, key=ROUNDOFF.__getitem__)
    assert_product(weight.grad.to(coarser), rows.t(), x.detach().reshape(-1, k))
    assert_product(bias.grad[None], torch.ones(1, len(rows)), rows)


@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, False), (False, True)])
def test_train_saves_only_what_it_needs(x_grad, weight_grad):
    x, weight = torch.randn(3, 16, requires_grad=x_grad), torch.randn(8, 16, requires_grad=weight_grad)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        octavo.int8.int8_linear_train(x, weight).sum().backward()
    assert [t.shape for t in kept] == [weight.shape if x_grad else x.shape]
    assert (x.grad is not None, weight.grad is not None) == (x_grad, weight_grad)


def test_train_under_autocast():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = octavo.int8.int8_linear_train(x, weight)
    grad = torch.randn(5, 8, dtype=torch.bfloat16)
    out.backward(grad)
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_product(weight.grad.bfloat16(), grad.t(), x.detach().bfloat16())


def test_train_learns_a_linear_map():
    target = torch.randn(4, 16)
    weight = torch.zeros(4, 16, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    for _ in range(200):
        x = torch.randn(64, 16)
        loss = (octavo.int8.int8_linear_train(x, weight, bias) - (x @ target.t() + 1.0)).square().mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What is left is the int8 noise: uniform errors of a step's width, in x and in the weight, over 16 features.
    noise = 16 * ((3.0 / 127) ** 2 / 12 * target.square().mean() + (target.abs().amax() / 127) ** 2 / 12)
    assert loss.item() < 4 * 4 * noise.item()


def test_forward_mode_is_an_error_not_a_zero():
    weight, scale = octavo.quantize_rowwise(torch.randn(4, 8))
    x = torch.randn(3, 8)
    for call in (
        lambda v: octavo.int8_matmul(v, weight, scale),
        lambda v: octavo.int8.int8_linear_train(v, torch.ones(4, 8)),
    ):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(call, (x,), (x,))


def test_a_meta_weight_does_not_give_an_empty_result():
    x, weight = torch.randn(3, 8), torch.empty(4, 8, dtype=torch.int8, device="meta")
    with pytest.raises(RuntimeError, match="one device, got cpu and meta"):
        octavo.int8_matmul(x, weight, torch.ones(4, device="meta"))
    with pytest.raises(RuntimeError, match="one device, got cpu and meta"):
        octavo.ops.int8_mm(weight, torch.ones(4, 8, dtype=torch.int8))
