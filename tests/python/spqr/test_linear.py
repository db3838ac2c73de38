"""spqr_matmul and SpQRLinear: gradients, the module's state, and what must never change it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import octavo
import pytest
import torch
from distributed import in_two_processes
from octavo.nn import SpQRLinear
from octavo.spqr import SpQRWeight, packing
from octavo.spqr.weight import TENSORS
from spqr_weights import random_weight
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDOFF)
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "2 bits": {"bits": 2, "group_size": 32, "perm": False},
    "4 bits, plain": {"bits": 4, "group_size": 64, "bilevel": False},
    "wide statistics": {"stats_group_size": 32, "scale_bits": 4, "zero_bits": 2},
    "no outliers": {"outliers": 0.0},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(n: int = 37, k: int = 128, bias: bool = True, dtype: torch.dtype | None = None, **options: Any) -> SpQRLinear:
    weight = random_weight(n, k, **{"unit": 2.0**-9, **options})
    return SpQRLinear.from_weight(weight, torch.randn(n, dtype=dtype).requires_grad_() if bias else None)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype
        assert torch.equal(a[name], b[name]), name


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """`got` is a @ b as its dtype can have it: roundings of the factors and of the result, fp32 sums."""
    a, b = a.double(), b.double()
    bound = (a.abs() @ b.abs()) * (3 * ROUNDOFF[got.dtype] + a.shape[-1] * 2.0**-23)
    bound += torch.finfo(got.dtype).smallest_normal
    error = (got.double() - a @ b).abs()
    assert got.shape == bound.shape
    assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


# ---- spqr_matmul ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (2, 9)])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, lead: tuple[int, ...], dtype: torch.dtype):
    weight = random_weight(37, 128, **{"unit": 2.0**-9, **CASES[case]})
    x = torch.randn(*lead, 128, dtype=dtype, requires_grad=True)
    bias = torch.randn(37, requires_grad=True)
    grad = torch.randn(*lead, 37, dtype=dtype)
    out = octavo.spqr_matmul(x, weight, bias)
    assert out.dtype is dtype
    out.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype is dtype
    rows, exact = grad.reshape(-1, 37), weight.dequantize(torch.float32)
    assert_product(x.grad.reshape(-1, 128), rows, exact)
    assert bias.grad is not None
    assert_product(bias.grad[None], torch.ones(1, len(rows)), rows)


def test_forward_is_the_op_with_and_without_gradients():
    weight = random_weight(20, 64)
    x, bias = torch.randn(6, 64), torch.randn(20)
    expected = octavo.ops.spqr_linear(x, *weight.arguments(), bias, 20, 16)
    assert torch.equal(octavo.spqr_matmul(x, weight, bias), expected)
    with_grad = octavo.spqr_matmul(x.requires_grad_(), weight, bias)
    assert torch.equal(with_grad, expected)
    assert with_grad.requires_grad
    reference = octavo.reference.spqr_linear(x.detach(), *weight.arguments(), bias, 20, 16)
    torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_only_what_is_needed_is_computed_and_kept():
    weight = random_weight(20, 64)
    x, bias = torch.randn(3, 64), torch.randn(20, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        octavo.spqr_matmul(x, weight, bias).sum().backward()
        assert saved == []
        octavo.spqr_matmul(x.requires_grad_(), weight).sum().backward()
    kept = {t.data_ptr() for t in saved}
    assert kept == {t.data_ptr() for t in weight.arguments()}  # not x
    assert torch.equal(bias.grad, torch.full((20,), 3.0))


def test_the_backward_pass_dequantizes_once_and_holds_nothing_more():
    weight = random_weight(256, 512, unit=2.0**-9)
    large: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.nbytes >= 256 * 512:
                large.append((str(func), out.nbytes))
            return out

    x = torch.randn(8, 512, dtype=torch.bfloat16, requires_grad=True)
    with Watch():
        octavo.spqr_matmul(x, weight).sum().backward()
    assert large == [("octavo.spqr_dequantize.default", 2 * 256 * 512)]


def test_autocast():
    weight = random_weight(20, 64, unit=2.0**-9)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = octavo.spqr_matmul(x, weight)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, octavo.spqr_matmul(x.bfloat16(), weight))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32


def test_what_has_no_gradient_says_so():
    weight = random_weight(20, 64)
    x = torch.randn(4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(octavo.spqr_matmul(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    learned = SpQRWeight(**{**vars(weight), "unit": weight.unit.clone().requires_grad_()})
    with pytest.raises(ValueError, match="a tensor of the weight requires a gradient"):
        octavo.spqr_matmul(x, learned)
    with torch.no_grad():
        octavo.spqr_matmul(x, learned)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda y: octavo.spqr_matmul(y, weight), (x.detach(),), (torch.ones(4, 64),))


def test_empty_batch_and_no_features():
    weight = random_weight(20, 64)
    x, bias = torch.randn(0, 64, requires_grad=True), torch.randn(20, requires_grad=True)
    octavo.spqr_matmul(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 64)
    assert torch.equal(bias.grad, torch.zeros(20))
    x = torch.randn(3, 0, requires_grad=True)
    octavo.spqr_matmul(x, random_weight(20, 0, outliers=0.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (3, 0)


def test_a_weight_is_an_argument_of_a_compiled_function():
    """One graph, without breaks, for every batch size; a weight with other outliers is no other graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(octavo.spqr_matmul, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, rows in ((0, 5), (0, 7), (1, 9), (1, 11)):
        weight = random_weight(20, 64, unit=2.0**-9, seed=seed)
        x, y = (torch.linspace(-2, 2, rows * 64).reshape(rows, 64).requires_grad_() for _ in range(2))
        out, expected = compiled(x, weight), octavo.spqr_matmul(y, weight)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


# ---- the module: what it computes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_module_is_the_product_and_dequantizes_to_it(case: str, dtype: torch.dtype):
    module = make(dtype=dtype, **CASES[case])
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(module(x), octavo.spqr_matmul(x, module.packed_weight, module.bias))
    linear = module.dequantize()
    assert type(linear) is nn.Linear
    assert linear.weight.dtype is dtype
    assert torch.equal(linear.weight, octavo.reference.spqr_dequantize(
        *module.packed_weight.arguments(), 37, 128, dtype, *module.options[1:]
    ))  # fmt: skip
    assert torch.equal(linear.bias, module.bias)
    assert linear.bias is not module.bias
    # x picks columns: what comes out is the weight itself
    exact = module.dequantize(torch.float32)
    eye = torch.eye(128)
    torch.testing.assert_close(module(eye) - module.bias.float(), exact.weight.t(), rtol=1e-5, atol=2e-6)
    assert make(bias=False).dequantize().bias is None


def test_new_module_is_zero():
    for bias in (True, False):
        module = SpQRLinear(64, 20, bias=bias, bits=2, dtype=torch.bfloat16)
        assert (module.bias is not None) == bias
        assert torch.equal(module(torch.randn(3, 64)), torch.zeros(3, 20))
        assert torch.equal(module.dequantize(torch.float32).weight, torch.zeros(20, 64))
        assert module.packed_weight.validate() == []


def test_accounting_and_repr():
    module = make(64, 512, outliers=0.0)
    assert module.nominal_bits == 3.625
    assert module.real_bits == module.packed_weight.real_bits > 3.625
    text = "SpQRLinear(in_features=512, out_features=64, bias=True, bits=3, group_size=16, stats_group_size=16, "
    assert repr(module) == text + "scale_bits=3, zero_bits=3, outliers=0)"
    plain = make(bits=4, bilevel=False, outliers=0.0, bias=False)
    assert repr(plain) == "SpQRLinear(in_features=128, out_features=37, bias=False, bits=4, group_size=16, outliers=0)"


def test_adapters_on_top_learn():
    """LoRA: the gradient reaches what is below a frozen layer and beside it."""
    base = make(n=64, k=64, bias=False)
    below = nn.Linear(64, 64)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    x, target = torch.randn(32, 64), torch.randn(32, 64)
    before = state_of(base)
    optimizer = torch.optim.Adam([*below.parameters(), *down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        h = below(x)
        loss = (base(h) + up(down(h)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert below.weight.grad is not None
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_same_state(state_of(base), before)


# ---- what must not change it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", ["to", "method", "type"])
def test_dtype_changes_stop_at_the_bias(case: str, dtype: torch.dtype, cast: str):
    module = make(**CASES[case])
    before = state_of(module)
    names = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}
    cast_to = {"to": module.to, "method": lambda _: getattr(module, names[dtype])(), "type": module.type}[cast]
    assert cast_to(dtype) is module
    assert module.bias is not None
    assert module.bias.dtype is dtype
    after = state_of(module)
    del before["bias"], after["bias"]
    assert_same_state(after, before)
    assert module(torch.randn(2, 128, dtype=dtype)).dtype is dtype


def test_training_mode_changes_nothing():
    module = make()
    before, outputs = state_of(module), []
    x = torch.randn(3, 128)
    for training in (False, True, False):
        module.train(training)
        y = x.clone().requires_grad_()
        out = module(y)
        out.sum().backward()
        outputs.append((out.detach(), y.grad))
    assert_same_state(state_of(module), before)
    assert all(torch.equal(a, b) for pair in zip(*outputs, strict=True) for a in pair for b in pair)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    module.requires_grad_(True)
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("case", CASES)
def test_copies(case: str):
    module = make(**CASES[case])
    x = torch.randn(3, 128)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(state_of(other), state_of(module))
        assert torch.equal(other(x), module(x))
        assert other.codes.data_ptr() != module.codes.data_ptr()
        assert other.options == module.options


def test_the_weight_is_shared_and_the_bias_copied():
    weight, bias = random_weight(20, 64), torch.randn(20)
    module = SpQRLinear.from_weight(weight, bias)
    assert all(getattr(module.packed_weight, name) is getattr(weight, name) for name in TENSORS)
    assert module.bias is not None
    assert not module.bias.requires_grad
    with torch.no_grad():
        module.bias.add_(1.0)
    assert not torch.equal(module.bias, bias)


def test_meta_device():
    module = SpQRLinear(64, 20, device="meta")
    assert all(t.is_meta for t in module.state_dict().values())
    assert module(torch.empty(3, 64, device="meta")).shape == (3, 20)
    empty = module.to_empty(device="cpu")
    assert empty.codes.dtype is torch.int32
    assert not empty.codes.is_meta
    source = make(20, 64, outliers=0.1)
    module = SpQRLinear(64, 20, device="meta")
    module.load_state_dict(source.state_dict(), assign=True)
    assert_same_state(state_of(module), state_of(source))
    assert all(t.is_meta for t in copy.deepcopy(source).to("meta").state_dict().values())


def test_compile_is_one_graph_for_every_batch_size():
    module = nn.Sequential(make(n=128), nn.ReLU(), make(bilevel=False, perm=False))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (4, 7, 2):
        x, y = (torch.linspace(-2, 2, rows * 128).reshape(rows, 128).requires_grad_() for _ in range(2))
        out, expected = compiled(x), module(y)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


# ---- state dict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, None),
        ({"outliers": 0.0}, {"outliers": 0.3}),
        ({"perm": False, "bilevel": False}, {}),
        ({}, {"perm": False, "bilevel": False, "outliers": 0.0}),
        ({"seed": 1}, {}),
    ],
)
def test_state_dict_round_trip(source: dict[str, Any], target: dict[str, Any] | None, assign: bool):
    old = make(**source)
    new = SpQRLinear(128, 37) if target is None else make(**target)
    new.load_state_dict(copy.deepcopy(old.state_dict()), assign=assign)
    assert_same_state(state_of(new), state_of(old))
    x = torch.randn(3, 128)
    assert torch.equal(new(x), old(x))


def test_state_dict_in_a_model_is_strict():
    model = nn.Sequential(make(n=128), make())
    state = model.state_dict()
    nn.Sequential(SpQRLinear(128, 128), SpQRLinear(128, 37)).load_state_dict(state)
    without = {name: value for name, value in state.items() if not name.startswith("1.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.codes"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.SCB"):
        model.load_state_dict(state | {"1.SCB": torch.zeros(1)})
    before = state_of(model)
    missing = model.load_state_dict({"1.bias": torch.ones(37)}, strict=False).missing_keys
    assert "1.codes" in missing
    assert_same_state(state_of(model), before | {"1.bias": torch.ones(37)})


GOOD = random_weight(37, 128, outliers=0.05)
LAST = int(GOOD.row_offsets[-1])


def edited(tensor: Tensor, at: int | tuple[int, ...], value: float) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


BAD_STATE: dict[str, tuple[dict[str, Tensor], str]] = {
    "codes dtype": ({"codes": GOOD.codes.long()}, r"codes must be int32 \[3, 4, 3, 16\], got int64"),
    "bits": ({"codes": GOOD.codes[:, :, :2]}, r"codes must be int32 \[3, 4, 3, 16\], got int32 \[3, 4, 2, 16\]"),
    "statistics": ({"statistics": GOOD.statistics[..., :10]}, r"statistics must be uint8 \[3, 8, 12\], got .* 10\]"),
    "second order": ({"second_order": GOOD.second_order.float()}, r"second_order must be float16 \[3, 8, 4\], got fl"),
    "second nan": ({"second_order": edited(GOOD.second_order, (1, 2, 3), torch.nan)}, "1 of 96 scales and zero points"),
    "unit shape": ({"unit": torch.tensor(1.0)}, r"unit must be float32 \[1\], got float32 \[\]"),
    "unit": ({"unit": torch.tensor([-1.0])}, "unit must be one positive number"),
    "outliers": ({"outliers": GOOD.outliers[:, 0]}, r"outliers must be int32 \[\d+, 1\], got int32 \[\d+\]"),
    "fewer": ({"outliers": GOOD.outliers[1:]}, f"end with {LAST - 1} .outliers., got 0 and {LAST}"),
    "column": ({"outliers": edited(GOOD.outliers, (0, 0), 200)}, r"outlier 0 \(row \d+\) has column 200, k is 128"),
    "value": ({"outliers": edited(GOOD.outliers, (LAST - 1, 0), 0x7C00 << 16 | 127)}, "1 of .* NaN or Inf"),
    "offsets": ({"row_offsets": GOOD.row_offsets[:-1]}, r"row_offsets must be int32 \[38\], got int32 \[37\]"),
    "falling": ({"row_offsets": edited(GOOD.row_offsets, 5, 0)}, "row_offsets decrease at row 4"),
    "perm": ({"perm": torch.zeros_like(GOOD.perm)}, "perm is not a permutation of 0 ... 127"),
    "perm shape": ({"perm": GOOD.perm[1:]}, r"perm must be int32 \[64\], got int32 \[63\]"),
    "bias": ({"bias": torch.zeros(37, dtype=torch.int32)}, r"bias must be float32, float16 or bfloat16 .37., got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATE)
def test_bad_state_is_one_clear_error_and_changes_nothing(case: str):
    change, message = BAD_STATE[case]
    module = make(seed=3)
    before = state_of(module)
    state = SpQRLinear.from_weight(GOOD, torch.ones(37)).state_dict() | change
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert_same_state(state_of(module), before)
    if "bias" not in change:
        with pytest.raises(ValueError, match=message):
            SpQRLinear.from_weight(SpQRWeight(**{**vars(GOOD), **change}))


@pytest.mark.parametrize("strict", [False, True])
def test_half_a_weight_is_refused(strict: bool):
    module = make(seed=3)
    before = state_of(module)
    state = SpQRLinear.from_weight(GOOD, torch.ones(37)).state_dict()
    del state["unit"], state["outliers"]
    with pytest.raises(RuntimeError, match="unit, outliers missing beside codes, statistics, second_order, row_offse"):
        module.load_state_dict(state, strict=strict)
    assert_same_state(state_of(module), before)


def test_every_error_is_named():
    state = make().state_dict() | {"unit": torch.zeros(2), "codes": torch.zeros(1), "bias": torch.zeros(1)}
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(SpQRLinear(128, 37)).load_state_dict({f"0.{name}": value for name, value in state.items()})
    for name in ("codes", "unit", "bias"):
        assert f"SpQRLinear '0': {name} must be" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"group_size": 8}, "group_size must be 16, 32 or 64, got 8"),
        ({"stats_group_size": 24}, "stats_group_size must be a multiple of 16 up to 1024, got 24"),
        ({"zero_bits": 0}, "zero_bits must be 1 to 4, got 0"),
        ({"in_features": 72}, "in_features must be a multiple of group_size 16, got 72"),
    ],
)
def test_bad_options(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        SpQRLinear(**{"in_features": 64, "out_features": 20, **options})


def test_wide_weights_keep_their_ids():
    module = make(3, 65552, outliers=0.0005, bias=False)
    assert module.outliers.shape[1] == 2
    new = SpQRLinear(65552, 3, bias=False)
    new.load_state_dict(module.state_dict())
    assert_same_state(state_of(new), state_of(module))
    assert int(packing.unpack_outliers(new.outliers)[0].max()) > 65535


# ---- distributed ---------------------------------------------------------------------------------------------------


def _broadcast(rank: int, world: int) -> None:
    for case in CASES.values():
        torch.manual_seed(0)
        module = make(**case)
        expected = state_of(module)
        if rank == 1:
            for tensor in module.state_dict().values():
                tensor.zero_()
        parallel = nn.parallel.DistributedDataParallel(module)  # it broadcasts parameters and buffers
        assert_same_state(state_of(module), expected)
        parallel(torch.ones(1, 128) * rank).sum().backward()
        assert module.bias is not None
        assert torch.equal(module.bias.grad, torch.ones(37))


def test_ddp_broadcasts_the_state():
    in_two_processes(_broadcast)
