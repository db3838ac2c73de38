"""NF4Linear: what it computes, its state (octavo's and bitsandbytes'), and what must never change it."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import octavo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo._linear4bit import MARK
from octavo.integrations.bitsandbytes import to_bitsandbytes_state
from octavo.nn import NF4Linear
from test_optim_distributed import in_two_processes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "double": {"double_quant": True},
    "fp4": {"quant_type": "fp4", "blocksize": 256},
    "nf3": {"quant_type": "nf3", "blocksize": 32, "double_quant": True},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(n: int = 37, k: int = 48, bias: bool = True, dtype: torch.dtype | None = None, **options: Any) -> NF4Linear:
    """Neither features nor their product are multiples of what a kernel would like."""
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **options)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype
        assert torch.equal(a[name], b[name]), name


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
        assert other.weight.data_ptr() != module.weight.data_ptr()
        assert repr(other) == repr(module) and other.weight_dtype is torch.bfloat16
        assert not any(p.requires_grad for name, p in other.named_parameters() if name != "bias")


@pytest.mark.parametrize("case", CASES)
def test_meta_device(case: str):
    module = NF4Linear(48, 37, device="meta", **CASES[case])
    assert all(t.is_meta for t in module.state_dict().values())
    assert module(torch.empty(3, 48, device="meta")).shape == (3, 37)
    empty = copy.deepcopy(module).to_empty(device="cpu")
    assert empty.weight.dtype is torch.uint8 and not empty.weight.is_meta
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


def changed(state: dict[str, Tensor], change: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in (state | change).items() if value is not None}


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


# ---- the state of bitsandbytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("case", ["default", "double", "fp4"])
def test_reads_what_bitsandbytes_would_write(case: str, target: bool, assign: bool):
    source = make(dtype=torch.bfloat16, **CASES[case])
    state = to_bitsandbytes_state(source)
    keys = ["weight", "bias", "weight.absmax", "weight.quant_map"]
    keys += ["weight.nested_absmax", "weight.nested_quant_map"] if source.double_quant else []
    assert list(state) == [*keys, f"{MARK}{source.quant_type}"]
    kept = dict(state)
    module = nn.Sequential(NF4Linear(48, 37, True, source.quant_type, source.blocksize, target))
    module.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    layer = module[0]
    assert isinstance(layer, NF4Linear)
    assert_same_state(state_of(layer), state_of(source.float() if not assign else source))
    assert layer.weight_dtype is torch.bfloat16
    assert state == kept  # the caller's dict is not changed


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_reads_other_storage_dtypes_of_bitsandbytes(storage: torch.dtype):
    """Its quant_storage: the same bytes, for FSDP's sake under another dtype."""
    source = make()
    state = to_bitsandbytes_state(source)
    module = NF4Linear(48, 37)
    module.load_state_dict(state | {"weight": state["weight"].flatten().view(storage).view(-1, 1)})
    assert torch.equal(module.weight, source.weight)


def test_an_offset_of_0_is_a_number():
    module = make(double_quant=True)
    module.load_state_dict(STATE | {f"{MARK}nf4": header(nested_offset=0)})
    assert module.offset.tolist() == [0.0]


def header(**changes: Any) -> Tensor:
    text = bytes(STATE[f"{MARK}nf4"].tolist()).decode()
    described = json.loads(text) | changes
    text = json.dumps({name: value for name, value in described.items() if value != "gone"})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = to_bitsandbytes_state(NF4Linear.from_linear(nn.Linear(48, 37), double_quant=True))
BAD_LINEAR4BIT: dict[str, tuple[dict[str, Any], str]] = {
    "json": ({f"{MARK}nf4": STATE[f"{MARK}nf4"][:-9]}, "is not JSON"),
    "utf8": ({f"{MARK}nf4": torch.full((9,), 255, dtype=torch.uint8)}, "is not JSON"),
    "empty": ({f"{MARK}nf4": STATE[f"{MARK}nf4"][:0]}, "is not JSON"),
    "deep": ({f"{MARK}nf4": torch.tensor(list(b"[" * 99999), dtype=torch.uint8)}, "is not JSON"),
    "list": ({f"{MARK}nf4": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, r"must hold an object, got b'\[1\]'"),
    "dtype": ({f"{MARK}nf4": STATE[f"{MARK}nf4"].int()}, "must be uint8 of one dimension, got torch.int32"),
    "type": ({f"{MARK}nf4": header(quant_type="fp4")}, "has quant_type = 'fp4'"),
    "unknown": ({f"{MARK}nf4": header(quant_type="int4")}, "has quant_type = 'int4'"),
    "two": ({f"{MARK}fp4": header(quant_type="fp4")}, "there must be one .*nf4, .*fp4"),
    "blocksize": ({f"{MARK}nf4": header(blocksize=65)}, "power of two from 32 to 4096, got 65"),
    "no blocksize": ({f"{MARK}nf4": header(blocksize="gone")}, "has blocksize = None"),
    "true": ({f"{MARK}nf4": header(blocksize=True)}, "has blocksize = True"),
    "other blocksize": ({f"{MARK}nf4": header(blocksize=128)}, r"is \('nf4', 128, \(37, 48\)\) in the checkpoint"),
    "shape": ({f"{MARK}nf4": header(shape=[48, 37])}, r"\(48, 37\)\) in the checkpoint, .*\(37, 48\)\) in the module"),
    "negative": ({f"{MARK}nf4": header(shape=[-37, -48])}, r"has shape = \[-37, -48\]"),
    "text": ({f"{MARK}nf4": header(shape="37x48")}, "has shape = '37x48'"),
    "weight dtype": (
        {f"{MARK}nf4": header(dtype="float64")},
        "has dtype = 'float64'; known: float32, float16, bfloat16",
    ),
    "nested": ({f"{MARK}nf4": header(nested_blocksize=128)}, "nested_blocksize = 128.*256 and 'float32' can be read"),
    "nested dtype": ({f"{MARK}nf4": header(nested_dtype="float16")}, "nested_dtype = 'float16'"),
    "offset": ({f"{MARK}nf4": header(nested_offset=float("nan"))}, "has nested_offset = nan"),
    "no offset": ({f"{MARK}nf4": header(nested_offset="gone")}, "has nested_offset = None"),
    "huge offset": ({f"{MARK}nf4": header(nested_offset=1e300)}, r"has nested_offset = 1e\+300"),
    "absmax": ({"weight.absmax": None}, r"weight\.absmax missing beside"),
    "map": ({"weight.quant_map": STATE["weight.quant_map"].flip(0)}, r"weight\.quant_map is not the code book of nf4"),
    "nested map": ({"weight.nested_quant_map": torch.zeros(256)}, r"nested_quant_map is not the signed dynamic map"),
    "map dtype": (
        {"weight.quant_map": STATE["weight.quant_map"].double()},
        r"the code book of nf4, torch\.float32 \[16\]",
    ),
    "nested map dtype": (
        {"weight.nested_quant_map": torch.zeros(256).half()},
        r"the signed dynamic map, .* got .*float16",
    ),
    "no dimension": ({"weight": torch.tensor(1.0)}, r"weight must be bytes, .* got torch\.float32 \[\]"),
    "storage": ({"weight": torch.zeros(111, dtype=torch.int64)}, r"weight must be bytes, .* got torch\.int64 \[111\]"),
    "meta": ({f"{MARK}nf4": STATE[f"{MARK}nf4"].to("meta")}, "nf4 is on the meta device"),
    "stranger": ({"weight.zero_point": torch.zeros(1)}, r"unknown weight\.zero_point"),
    "short": ({"weight": STATE["weight"][:-1]}, r"weight must be uint8 \[888\], got uint8 \[887\]"),
    "short absmax": ({"weight.absmax": STATE["weight.absmax"][:-1]}, r"absmax must be uint8 \[28\], got uint8 \[27\]"),
    "plain absmax": ({"weight.absmax": torch.ones(28)}, r"absmax must be uint8 \[28\], got float32 \[28\]"),
}


@pytest.mark.parametrize("case", BAD_LINEAR4BIT)
def test_damaged_states_of_bitsandbytes_change_nothing(case: str):
    change, message = BAD_LINEAR4BIT[case]
    module = make()
    before = state_of(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(changed(STATE, change))
    assert_same_state(state_of(module), before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(("nf4", "float32")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=5,
)
FIELDS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "other")


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_description_loads_or_is_refused_in_words(changes: dict[str, Any]):
    module = make(double_quant=True)
    before, refusal = state_of(module), ""
    try:
        module.load_state_dict(STATE | {f"{MARK}nf4": header(**changes)})
    except RuntimeError as error:
        refusal = str(error)
    if refusal:
        assert "Error(s) in loading state_dict for NF4Linear:\n\tNF4Linear: " in refusal
        assert_same_state(state_of(module), before)
    else:
        assert torch.equal(module.weight, STATE["weight"].flatten())


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
