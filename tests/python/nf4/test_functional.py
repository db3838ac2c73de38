"""Products with low-bit block-wise weights: against float64 on every backend, and the differentiable function."""

from __future__ import annotations

from itertools import product
from typing import Any

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS
from octavo import reference
from octavo.nf4 import NF4Weight
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# n, k, and settings: whole tiles and their tails; rows that are no multiple of the block, or of a byte; n % 32 != 0;
# blocks of several rows; k from one to several chunks of every kernel.
CASES: list[tuple[int, int, dict[str, Any]]] = [
    (64, 128, {}),
    (32, 256, {"double_quant": True}),
    (1, 1, {}),
    (48, 64, {"quant_type": "fp4"}),
    (17, 48, {"double_quant": True}),
    (40, 80, {"quant_type": "fp4", "blocksize": 32, "double_quant": True}),
    (33, 96, {}),
    (3, 1152, {"blocksize": 256}),
    (50, 7, {"blocksize": 128}),
    (20, 320, {"blocksize": 4096, "double_quant": True}),
    (35, 130, {"blocksize": 32}),
    (36, 64, {"quant_type": "nf2"}),
    (21, 75, {"quant_type": "nf3", "double_quant": True}),
    (19, 192, {"quant_type": "nf8"}),
]


def ids(case: object) -> str:
    return str(case).replace(" ", "")


def make(n: int, k: int, seed: int = 0, **options: Any) -> NF4Weight:
    """Of rows that differ in scale by up to 16: blocks across rows then show what scale they were given."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.logspace(-2, 2, n, base=2)[:, None] / max(1, k) ** 0.5
    return octavo.quantize_4bit(weight, **options)


def linear(ops: Any, x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    return ops.nf4_linear(x, *w.tensors(), bias, w.shape[0], w.quant_type, w.blocksize)


def transposed(ops: Any, g: Tensor, w: NF4Weight) -> Tensor:
    return ops.nf4_linear_transposed(g, *w.tensors(), w.shape[1], w.quant_type, w.blocksize)


def dense(w: NF4Weight) -> Tensor:
    return reference.nf4_dequantize(*w.tensors(), w.shape, torch.float32, w.quant_type, w.blocksize)


def check_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of torch's product in x's dtype, plus fp32 noise of the terms: in
    the mean square, and in no element more than four times torch's largest (three values of the code book are not
    rounded to the nearest bf16: csrc/common/normal_float.h)."""
    exact = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    assert got.dtype is x.dtype
    assert got.shape == exact.shape
    peer = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    error, of_peer = (got.double() - exact).abs(), (peer.double() - exact).abs()
    allowed = 4 * (of_peer.max() if exact.numel() else 0.0) + 2e-6 * terms
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, {(error / allowed).max():.3g} times the bound"
    assert error.norm() <= 2 * of_peer.norm() + 2e-6 * terms.norm(), f"error {error.norm() / of_peer.norm():.3g} times"


def rows_for(ops: Ops) -> tuple[int, ...]:
    return (1, 5, 18) if ops.backend.startswith("simt") else (1, 2, 3, 4, 7, 12, 16, 17, 40, 130)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_products(ops: Ops, case: tuple[int, int, dict[str, Any]], dtype: torch.dtype):
    n, k, options = case
    weight = make(n, k, **options)
    whole, g = dense(weight), torch.Generator().manual_seed(1)
    for m in rows_for(ops):
        bias = torch.randn(n, generator=g) if m % 2 else None
        x = torch.randn(m, k, generator=g).to(dtype)
        check_close(linear(ops, x, weight, bias), x, whole, bias)
        y = torch.randn(m, n, generator=g).to(dtype)
        check_close(transposed(ops, y, weight), y, whole.t())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_of_any_dtype(ops: Ops, dtype: torch.dtype):
    weight, x = make(17, 48), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-2, 2, 17).to(dtype)
    for kind in FLOATS:
        check_close(linear(ops, x.to(kind), weight, bias), x.to(kind), dense(weight), bias)


def test_zero_blocks_and_the_smallest_scales(ops: Ops):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[2:4] = 0.0
    x[5] *= 2.0**-120
    for double_quant in (False, True):
        weight = octavo.quantize_4bit(x, double_quant=double_quant)
        for dtype in FLOATS:
            identity = torch.eye(64, dtype=dtype)
            exact = dense(weight).to(dtype).double()
            for got in (linear(ops, identity, weight).t(), transposed(ops, torch.eye(8, dtype=dtype), weight)):
                bound = exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
                assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("m", [1, 3, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_does_not_matter(ops: Ops, m: int, dtype: torch.dtype):
    """A power of two in x is one in the product, to the bit, well within fp32's range."""
    weight = make(33, 96)
    g = torch.Generator().manual_seed(m)
    x, y = torch.randn(m, 96, generator=g).to(dtype), torch.randn(m, 33, generator=g).to(dtype)
    products = linear(ops, x, weight), transposed(ops, y, weight)
    for exponent in (-80, 80):
        scaled = linear(ops, x * 2.0**exponent, weight), transposed(ops, y * 2.0**exponent, weight)
        assert all(torch.equal(s, p * 2.0**exponent) for s, p in zip(scaled, products, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_that_are_not_around_zero(ops: Ops, dtype: torch.dtype):
    """Values of the code book that meet 16-bit x have no common error: it would grow like k, not like its root."""
    k = 11008 if ops.backend.startswith("cpu") else 2048
    weight = make(32, k)
    exact, rounded = dense(weight).double(), weight.dequantize(dtype).double()
    for m in rows_for(ops):
        x = torch.rand(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        want = x.double() @ exact.T
        error = (linear(ops, x, weight).double() - want).norm()
        assert error <= 2 * ((x.double() @ rounded.T).to(dtype).double() - want).norm()


@pytest.mark.parametrize("m", [1, 3, 8, 16])
def test_large_and_small_x_with_small_weights(ops: Ops, m: int):
    if not ops.backend.startswith("cpu"):
        pytest.skip("on a GPU bf16 x from about 2**110 on may overflow: csrc/nf4/nf4.h")
    weight = octavo.quantize_4bit(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.01)
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).bfloat16()
    plain = linear(ops, x, weight)
    for exponent in (-100, 122):
        assert torch.equal(linear(ops, x * 2.0**exponent, weight), plain * 2.0**exponent)


def test_shapes_views_and_empty(ops: Ops):
    weight, g = make(20, 64), torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 128, generator=g)[..., ::2], torch.randn(2, 20, 5, generator=g).mT
    got = linear(ops, x, weight)
    assert got.shape == (4, 3, 20)
    assert torch.equal(got, linear(ops, x.contiguous(), weight))
    assert torch.equal(linear(ops, x[0, 0], weight), linear(ops, x[0, :1], weight)[0])
    assert torch.equal(transposed(ops, y, weight), transposed(ops, y.contiguous(), weight))
    assert linear(ops, x[:0], weight).shape == (0, 3, 20)
    assert transposed(ops, y[:0], weight).shape == (0, 5, 64)
    for (n, k), dtype, m, nested in product(((0, 64), (20, 0), (0, 0)), FLOATS, (2, 20), (False, True)):
        empty, bias = make(n, k, double_quant=nested), torch.randn(n, generator=g).to(dtype)
        assert torch.equal(linear(ops, torch.ones(m, k, dtype=dtype), empty, bias), bias.expand(m, n))
        assert torch.equal(transposed(ops, torch.ones(m, n, dtype=dtype), empty), torch.zeros(m, k, dtype=dtype))
    tensors = [t if t is None else torch.stack([t, t], 1)[:, 0] for t in make(20, 64, double_quant=True).tensors()]
    strided = NF4Weight(*tensors, *(getattr(weight, name) for name in ("shape", "dtype", "quant_type", "blocksize")))
    assert torch.equal(linear(ops, x, strided), linear(ops, x, make(20, 64, double_quant=True)))


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_rows_stay_alone(ops: Ops, m: int, dtype: torch.dtype):
    weight = make(20, 64)
    for width, call in ((64, linear), (20, transposed)):
        x = torch.randn(m, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        clean = call(ops, x, weight)
        x[0, 5], x[2, width - 1] = float("nan"), float("inf")
        got = call(ops, x, weight)
        assert not got[[0, 2]].isfinite().any()
        others = [i for i in range(m) if i not in (0, 2)]
        assert torch.equal(got[others], clean[others])


def test_threads_do_not_change_bits():
    weight = make(300, 257, blocksize=32)
    g = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(m, 257, generator=g), torch.randn(m, 300, generator=g)) for m in (1, 70)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([f(octavo, t, weight) for x, y in inputs for f, t in ((linear, x), (transposed, y))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


W = make(20, 64)
X, Y = torch.ones(2, 64), torch.ones(2, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: linear(o, X.double(), W), "nf4_linear: x must be float32, float16 or bfloat16, got float64"),
        (lambda o: linear(o, X[:, :60], W), r"packed must have shape \[600\] \(1200 elements of 4 bits\), got \[640\]"),
        (lambda o: linear(o, torch.tensor(1.0), W), "nf4_linear: x must have at least 1 dimension, got a scalar"),
        (lambda o: linear(o, X, W, torch.ones(19)), r"bias must have shape \[20\] \(the output features\), got \[19\]"),
        (lambda o: linear(o, X, W, torch.ones(20).int()), "bias must be .*got int32"),
        (lambda o: o.nf4_linear(X, *W.tensors(), None, -1), "n must not be negative, got -1"),
        (lambda o: o.nf4_linear(X, *W.tensors(), None, 2**62), "more elements than memory could hold"),
        (lambda o: o.nf4_linear(X, *W.tensors(), None, 20, "int4"), "got 'int4'"),
        (lambda o: o.nf4_linear(X, *W.tensors(), None, 20, "nf4", 48), "got 48"),
        (lambda o: o.nf4_linear(X, *W.tensors(), None, 20, "nf4", 128), r"absmax .*\[10\].*got \[20\]"),
        (lambda o: transposed(o, Y.int(), W), "nf4_linear_transposed: g must be .*got int32"),
        (lambda o: transposed(o, Y[:, :19], W), r"packed must have shape \[608\] .*got \[640\]"),
        (lambda o: o.nf4_linear_transposed(Y, *W.tensors(), -64), "k must not be negative, got -64"),
    ],
)
def test_errors_name_the_values(ops: Ops, call: Any, message: str):
    with pytest.raises(RuntimeError, match=message):
        call(ops)


# ---- nf4_matmul ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (1,), (2, 9)])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 5, 8, 12)], ids=ids)
def test_gradients(case: tuple[int, int, dict[str, Any]], lead: tuple[int, ...], dtype: torch.dtype):
    n, k, options = case
    weight, g = make(n, k, **options), torch.Generator().manual_seed(0)
    x = torch.randn(*lead, k, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(n, generator=g).requires_grad_()
    grad = torch.randn(*lead, n, generator=g).to(dtype)
    out = octavo.nf4_matmul(x, weight, bias)
    check_close(out.detach().reshape(-1, n), x.detach().reshape(-1, k), dense(weight), bias.detach())
    out.backward(grad)
    assert x.grad is not None and bias.grad is not None
    check_close(x.grad.reshape(-1, k), grad.reshape(-1, n), dense(weight).t())
    torch.testing.assert_close(bias.grad, grad.reshape(-1, n).double().sum(0).float(), rtol=1e-5, atol=1e-5)


def test_forward_is_the_op_with_and_without_gradients():
    weight, g = make(20, 64, double_quant=True), torch.Generator().manual_seed(0)
    x, bias = torch.randn(6, 64, generator=g), torch.randn(20, generator=g)
    expected = octavo.ops.nf4_linear(x, *weight.tensors(), bias, 20)
    assert torch.equal(octavo.nf4_matmul(x, weight, bias), expected)
    with_grad = octavo.nf4_matmul(x.requires_grad_(), weight, bias)
    assert torch.equal(with_grad, expected)
    assert with_grad.requires_grad


def test_x_is_not_kept_and_the_weight_is_never_whole():
    weight = make(256, 512)
    saved: list[Tensor] = []
    large: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.nbytes >= 256 * 512:
                large.append(str(func))
            return out

    x = torch.randn(8, 512, dtype=torch.bfloat16, requires_grad=True)
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        octavo.nf4_matmul(x, weight).sum().backward()
    assert large == []
    assert {t.data_ptr() for t in saved} == {weight.packed.data_ptr(), weight.absmax.data_ptr()}


def test_autocast():
    weight = make(20, 64)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = octavo.nf4_matmul(x, weight)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, octavo.nf4_matmul(x.bfloat16(), weight))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32


def test_what_has_no_gradient_says_so():
    weight = make(20, 64)
    x = torch.randn(4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(octavo.nf4_matmul(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    learned = weight.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    with pytest.raises(ValueError, match="a tensor of the weight requires a gradient"):
        octavo.nf4_matmul(x, learned)
    with torch.no_grad():
        octavo.nf4_matmul(x, learned)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda y: octavo.nf4_matmul(y, weight), (x.detach(),), (torch.ones(4, 64),))


def test_nf4_matmul_refuses():
    with pytest.raises(ValueError, match=r"w must be a matrix \[n, k\], got shape \[2, 5, 64\]"):
        octavo.nf4_matmul(X, octavo.quantize_4bit(torch.ones(2, 5, 64)))
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 20\] and w of shape \[20, 64\] differ in k"):
        octavo.nf4_matmul(Y, W)


def test_compile_is_one_graph_for_every_batch_size():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(octavo.nf4_matmul, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, rows in ((0, 5), (0, 7), (1, 9), (1, 11)):
        weight = make(20, 64, seed=seed)
        x, y = (torch.linspace(-2, 2, rows * 64).reshape(rows, 64).requires_grad_() for _ in range(2))
        out, expected = compiled(x, weight), octavo.nf4_matmul(y, weight)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert x.grad is not None and y.grad is not None
        assert torch.equal(x.grad, y.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
