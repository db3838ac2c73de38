"""NF4Linear: what it computes, its state (octavo's and bitsandbytes'), and what must never change it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import octavo
import pytest
import torch
from distributed import in_two_processes
from nf4_layers import CASES, assert_same_state, changed, make, state_of
from octavo.nn import NF4Linear
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_module_is_the_product_and_dequantizes_to_it(case: str, dtype: torch.dtype):
    linear = nn.Linear(48, 37, dtype=dtype)
    module = NF4Linear.from_linear(linear, **CASES[case])
    weight = octavo.quantize_4bit(linear.weight.detach(), **CASES[case])
    for mine, expected in zip(module.packed_weight.tensors(), weight.tensors(), strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or expected is None or torch.equal(mine, expected)
    x = torch.randn(2, 3, 48, dtype=dtype)
    assert torch.equal(module(x), octavo.nf4_matmul(x, weight, linear.bias))
    plain = module.dequantize()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype is dtype
    assert torch.equal(plain.weight, weight.dequantize())
    assert torch.equal(plain.bias, linear.bias)
    assert plain.bias is not module.bias
    whole = module.dequantize(torch.float32)
    assert (whole.weight.dtype, whole.bias.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(module(torch.eye(48)) - module.bias.float(), whole.weight.t(), rtol=1e-5, atol=2e-6)
    assert make(bias=False).dequantize().bias is None


def test_from_linear_leaves_the_linear_alone():
    linear = nn.Linear(48, 37).eval()
    linear.bias.requires_grad_(False)
    before = state_of(linear)
    module = NF4Linear.from_linear(linear, double_quant=True)
    assert module.bias is not None
    assert not module.training and not module.bias.requires_grad
    with torch.no_grad():
        module.bias.add_(1.0)
    assert_same_state(state_of(linear), before)


def test_new_module_is_zero():
    for options in CASES.values():
        module = NF4Linear(48, 37, dtype=torch.bfloat16, **options)
        assert torch.equal(module(torch.randn(3, 48)), torch.zeros(3, 37))
        assert torch.equal(module.dequantize().weight, torch.zeros(37, 48, dtype=torch.bfloat16))
    assert NF4Linear(48, 37, bias=False).bias is None


def test_repr_says_how_it_is_quantized():
    text = "NF4Linear(in_features=48, out_features=37, bias=True, quant_type=nf4, blocksize=64"
    assert repr(make()) == text + ")"
    assert repr(make(double_quant=True)) == text + ", double_quant=True)"


def test_a_weight_is_shared_and_the_bias_copied():
    weight, bias = octavo.quantize_4bit(torch.randn(37, 48), double_quant=True), torch.randn(37)
    module = NF4Linear.from_weight(weight, bias)
    pairs = zip(module.packed_weight.tensors(), weight.tensors(), strict=True)
    assert all(a is not None and b is not None and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert module.bias is not None and not module.bias.requires_grad
    assert module.bias.data_ptr() != bias.data_ptr()


def test_adapters_on_top_learn_through_train_and_eval():
    """bitsandbytes 0.50 changes its weight in the first forward in eval mode on the CPU; x has no gradient after."""
    base = make(n=48, k=80, bias=False, double_quant=True)
    below = nn.Linear(80, 80)
    down, up = nn.Linear(80, 4, bias=False), nn.Linear(4, 48, bias=False)
    nn.init.zeros_(up.weight)
    x, target = torch.randn(32, 80), torch.randn(32, 48)
    before = state_of(base)
    optimizer = torch.optim.Adam([*below.parameters(), *down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for step in range(30):
        base.eval()
        with torch.no_grad():
            base(x[:1])
        base.train(step % 2 == 0)
        h = below(x)
        loss = (base(h) + up(down(h)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert below.weight.grad is not None and bool(below.weight.grad.any())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert_same_state(state_of(base), before)


# ---- what must not change it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", ["to", "method", "type"])
def test_dtype_changes_stop_at_the_bias(case: str, dtype: torch.dtype, cast: str):
    module = nn.Sequential(make(**CASES[case]))
    before = state_of(module)
    names = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}
    cast_to = {"to": module.to, "method": lambda _: getattr(module, names[dtype])(), "type": module.type}[cast]
    assert cast_to(dtype) is module
    after = state_of(module)
    assert after.pop("0.bias").dtype is dtype
    del before["0.bias"]
    assert_same_state(after, before)
    assert not any(p.requires_grad for name, p in module.named_parameters() if name != "0.bias")
    assert module(torch.randn(2, 48, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("case", CASES)
def test_training_mode_changes_nothing(case: str):
    module = make(**CASES[case])
    before, outputs = state_of(module), []
    x = torch.randn(3, 48)
    for training in (False, True, False):
        module.train(training)
        y = x.clone().requires_grad_()
        out = module(y)
        out.sum().backward()
        assert y.grad is not None
        outputs.append((out.detach(), y.grad))
    assert_same_state(state_of(module), before)
    assert all(torch.equal(a, b) for pair in zip(*outputs, strict=True) for a in pair for b in pair)


def test_only_the_bias_learns():
    module = make(double_quant=True)
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["bias"]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    before = state_of(module)
    module(torch.randn(3, 48)).sum().backward()
    optimizer.step()
    after = state_of(module)
    assert not torch.equal(after.pop("bias"), before.pop("bias"))
    assert_same_state(after, before)


@pytest.mark.parametrize("case", CASES)
def test_copies(case: str):
    module = make(dtype=torch.bfloat16, **CASES[case])
    x = torch.randn(3, 48)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(state_of(other), state_of(module))
        assert torch.equal(other(x), module(x))
        assert other.codes.data_ptr() != module.codes.data_ptr()
        assert repr(other) == repr(module) and other.weight_dtype is torch.bfloat16
        assert not any(p.requires_grad for name, p in other.named_parameters() if name != "bias")


@pytest.mark.parametrize("case", CASES)
def test_meta_device(case: str):
    module = NF4Linear(48, 37, device="meta", **CASES[case])
    assert all(t.is_meta for t in module.state_dict().values())
    assert module(torch.empty(3, 48, device="meta")).shape == (3, 37)
    empty = copy.deepcopy(module).to_empty(device="cpu")
    assert empty.codes.dtype is torch.uint8 and not empty.weight.is_meta
    source = make(**CASES[case])
    module.load_state_dict(source.state_dict(), assign=True)
    assert_same_state(state_of(module), state_of(source))
    assert all(t.is_meta for t in copy.deepcopy(source).to("meta").state_dict().values())
    with torch.device("meta"):
        linear = nn.Linear(48, 37)
    quantized = NF4Linear.from_linear(linear, **CASES[case]).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in quantized.items()} == {
        name: (t.shape, t.dtype) for name, t in source.state_dict().items()
    }


def test_compile_is_one_graph_for_every_batch_size():
    module = nn.Sequential(make(n=80, k=48), nn.ReLU(), make(n=37, k=80, double_quant=True))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (4, 7, 2):
        x, y = (torch.linspace(-2, 2, rows * 48).reshape(rows, 48).requires_grad_() for _ in range(2))
        out, expected = compiled(x), module(y)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert x.grad is not None and y.grad is not None
        assert torch.equal(x.grad, y.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


# ---- state dict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("target", [None, False, True])
def test_state_dict_round_trip(source: bool, target: bool | None, assign: bool):
    """Whether there is double quantization comes with the state."""
    old = make(double_quant=source)
    new = NF4Linear(48, 37) if target is None else make(double_quant=target)
    new.load_state_dict(copy.deepcopy(old.state_dict()), assign=assign)
    assert_same_state(state_of(new), state_of(old))
    assert new.double_quant == source
    assert not any(p.requires_grad for name, p in new.named_parameters() if name != "bias")
    x = torch.randn(3, 48)
    assert torch.equal(new(x), old(x))


def test_state_dict_in_a_model_is_strict():
    model = nn.Sequential(make(n=48), make())
    state = model.state_dict()
    nn.Sequential(NF4Linear(48, 48), NF4Linear(48, 37)).load_state_dict(state)
    without = {name: value for name, value in state.items() if not name.startswith("1.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.weight"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.SCB"):
        model.load_state_dict(state | {"1.SCB": torch.zeros(1)})
    before = state_of(model)
    missing = model.load_state_dict({"1.bias": torch.ones(37)}, strict=False).missing_keys
    assert "1.weight" in missing
    assert_same_state(state_of(model), before | {"1.bias": torch.ones(37)})


GOOD = NF4Linear.from_linear(nn.Linear(48, 37), double_quant=True).state_dict()
BAD_STATE: dict[str, tuple[dict[str, Any], str]] = {
    "weight dtype": ({"weight": GOOD["weight"].int()}, r"weight must be uint8 \[888\], got int32 \[888\]"),
    "weight length": ({"weight": GOOD["weight"][:-1]}, r"weight must be uint8 \[888\], got uint8 \[887\]"),
    "weight shape": ({"weight": GOOD["weight"][:, None]}, r"weight must be uint8 \[888\], got uint8 \[888, 1\]"),
    "absmax length": ({"absmax": GOOD["absmax"][:-1]}, r"absmax must be uint8 \[28\], got uint8 \[27\]"),
    "absmax dtype": ({"absmax": torch.ones(28)}, r"absmax must be uint8 \[28\], got float32 \[28\]"),
    "nested": ({"nested_absmax": torch.ones(2)}, r"nested_absmax must be float32 \[1\], got float32 \[2\]"),
    "nested nan": ({"nested_absmax": torch.tensor([torch.nan])}, "nested_absmax has 1 non-finite values of 1"),
    "offset": ({"offset": torch.ones(1).half()}, r"offset must be float32 \[1\], got float16 \[1\]"),
    "offset inf": ({"offset": torch.tensor([torch.inf])}, "offset has 1 non-finite values of 1"),
    "no offset": ({"offset": None}, "offset is missing"),
    "no absmax": ({"absmax": None}, "absmax is missing"),
    "plain": (
        {"offset": None, "nested_absmax": None, "absmax": -torch.ones(28)},
        "absmax has negative values, .* -1.0",
    ),
    "plain nan": (
        {"offset": None, "nested_absmax": None, "absmax": torch.full((28,), torch.nan)},
        "absmax has 28 non-finite",
    ),
    "bias": ({"bias": torch.zeros(36)}, r"bias must be float32, float16 or bfloat16 \[37\], got float32 \[36\]"),
    "bias dtype": ({"bias": torch.zeros(37).double()}, "bias must be .*, got float64"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", BAD_STATE)
def test_bad_state_is_a_clear_error_and_changes_nothing(case: str, strict: bool):
    change, message = BAD_STATE[case]
    module = make()
    before = state_of(module)
    with pytest.raises(RuntimeError, match=f"NF4Linear: {message}"):
        module.load_state_dict(changed(GOOD, change), strict=strict)
    assert_same_state(state_of(module), before)


def test_every_error_is_named():
    state = GOOD | {"weight": torch.zeros(1), "absmax": torch.zeros(1), "bias": torch.zeros(1)}
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(NF4Linear(48, 37)).load_state_dict({f"0.{name}": value for name, value in state.items()})
    for name in ("weight", "absmax", "bias"):
        assert f"NF4Linear '0': {name} must be" in str(caught.value)


# ---- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type must be one of nf2, nf3, nf4, nf8, fp4, got 'int4'"),
        ({"blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NF4Linear(48, 37, **options)
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite(value: float):
    linear = nn.Linear(48, 37)
    with torch.no_grad():
        linear.weight[3, [4, 7]] = value
    with pytest.raises(ValueError, match=r"Linear\(in_features=48.*2 of 1776 weights are NaN or Inf"):
        NF4Linear.from_linear(linear)


def test_bad_dtypes_weights_and_inputs():
    with pytest.raises(ValueError, match="the weight must be float32, float16 or bfloat16, got float64"):
        make(dtype=torch.float64)
    linear = nn.Linear(48, 37)
    linear.bias.data = linear.bias.data.double()
    with pytest.raises(ValueError, match="the bias must be float32, float16 or bfloat16, got float64"):
        NF4Linear.from_linear(linear)
    with pytest.raises(ValueError, match=r"must be a matrix, got shape \[2, 3, 48\]"):
        NF4Linear.from_weight(octavo.quantize_4bit(torch.randn(2, 3, 48)))
    weight = octavo.quantize_4bit(torch.randn(37, 48))
    with pytest.raises(ValueError, match=r"from_weight: bias must be .* \[37\], got float32 \[36\]"):
        NF4Linear.from_weight(weight, torch.zeros(36))
    with pytest.raises(RuntimeError, match=r"x of shape \[3, 47\] does not end with in_features 48"):
        make()(torch.randn(3, 47))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        make()(torch.randn(3, 48, dtype=torch.float64))


# ---- distributed -----------------------------------------------------------------------------------------------------


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
        parallel(torch.ones(1, 48) * rank).sum().backward()
        assert module.bias is not None
        assert torch.equal(module.bias.grad, torch.ones(37))


def test_ddp_broadcasts_the_state():
    in_two_processes(_broadcast)
