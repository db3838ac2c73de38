"""Int8Linear as a module: what it computes, what its state is, and what must never change it."""

import copy
import pickle
import subprocess
import sys

import octavo
import pytest
import torch
from octavo.integrations.bitsandbytes import to_bitsandbytes_state
from octavo.nn import Int8Linear
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(n=12, k=40, bias=True, dtype=None, **options) -> tuple[nn.Linear, Int8Linear]:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return linear, Int8Linear.from_linear(linear, **options)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype
        assert torch.equal(a[name], b[name]), name


# ---- what it computes ----------------------------------------------------------------------------------------------


def test_close_to_the_linear_it_comes_from():
    linear, module = make(n=24, k=70)
    x = torch.randn(2, 5, 70)
    out, expected = module(x), linear(x)
    assert out.shape == expected.shape
    # Rounding moves x by at most half a step sx and the weight by half a step sw: |x||dw| + |dx||w| + |dx||dw|.
    dx = (x.abs().amax(-1, keepdim=True) / 254).expand_as(x)
    dw = (linear.weight.abs().amax(-1, keepdim=True) / 254).expand_as(linear.weight)
    bound = x.abs() @ dw.t() + dx @ linear.weight.abs().t() + dx @ dw.t() + 1e-5
    assert bool(((out - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_quantized_from_its_own_dtype(dtype):
    linear = nn.Linear(30, 8, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] *= 3e-5  # below fp16's normal numbers
        if dtype is not torch.float16:
            linear.weight[4] *= 1e6  # above fp16's range
    module = Int8Linear.from_linear(linear)
    codes, scale = octavo.reference.quantize_rowwise(linear.weight.detach())
    assert torch.equal(module.codes, codes)
    assert torch.equal(module.weight_scale, scale)
    assert module.bias.dtype is dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype):
    linear, module = make(dtype=dtype)
    back = module.dequantize()
    assert type(back) is nn.Linear
    assert back.weight.dtype is dtype
    assert torch.equal(back.bias, linear.bias)
    step = module.weight_scale[:, None] * (0.5 + 1e-4)
    rounding = linear.weight.abs().float() * torch.finfo(dtype).eps
    assert bool(((back.weight.float() - linear.weight.float()).abs() <= step + rounding).all())
    assert module.dequantize(torch.float32).weight.dtype is torch.float32
    assert make(bias=False)[1].dequantize().bias is None


def test_kept_columns_are_exact():
    linear, module = make(keep_columns=torch.tensor([33, 2]))
    assert module.kept_columns == 2
    assert module.outlier_slot[[2, 33]].tolist() == [0, 1]
    assert int((module.outlier_slot >= 0).sum()) == 2
    assert torch.equal(module.outlier_weight, linear.weight[:, [2, 33]].t())
    assert torch.equal(module.dequantize().weight[:, [2, 33]], linear.weight[:, [2, 33]])
    x = torch.zeros(3, 40)
    x[:, 2] = 50.0  # an outlier column and nothing else: the product is fp32 with the true weight
    torch.testing.assert_close(module(x), linear(x), rtol=1e-6, atol=1e-6)
    plain = Int8Linear.from_linear(linear)
    assert not torch.allclose(plain(x), linear(x), rtol=1e-3, atol=1e-3)


def test_kept_columns_take_the_narrowest_exact_dtype():
    linear = nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
    assert Int8Linear.from_linear(linear, keep_columns=[1]).outlier_weight.dtype is torch.bfloat16
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 16).half())
    assert Int8Linear.from_linear(linear, keep_columns=[1]).outlier_weight.dtype is torch.float16
    assert Int8Linear.from_linear(nn.Linear(16, 4), keep_columns=[1]).outlier_weight.dtype is torch.float32
    assert Int8Linear.from_linear(linear, keep_columns=[]).outlier_weight is None


@pytest.mark.parametrize("bias", [True, False])
def test_new_module_is_zero(bias):
    module = Int8Linear(40, 12, bias=bias, dtype=torch.bfloat16)
    assert (module.bias is not None) == bias
    assert torch.equal(module(torch.randn(3, 40)), torch.zeros(3, 12))


def test_autocast():
    _, module = make()
    x = torch.randn(4, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, module(x.bfloat16()))


def test_repr():
    _, module = make(threshold=3.0, keep_columns=[1])
    assert repr(module) == "Int8Linear(in_features=40, out_features=12, bias=True, threshold=3.0, kept_columns=1)"


# ---- what must not change it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, [1, 5]])
def test_forward_and_backward_leave_the_state(keep):
    _, module = make(keep_columns=keep)
    before = state_of(module)
    for training in (False, True, False):
        module.train(training)
        module(torch.randn(3, 40, requires_grad=True) * 4).sum().backward()
    assert_same_state(state_of(module), before)


def test_gradients_survive_eval_and_train():
    _, module = make()
    grads = []
    for training in (True, False, True):
        module.train(training)
        x = torch.ones(2, 40, requires_grad=True)
        module(x).sum().backward()
        grads.append(x.grad)
    assert float(grads[0].abs().min()) > 0
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", ["to", "method", "type"])
def test_dtype_changes_stop_at_the_bias(dtype, cast):
    _, module = make(keep_columns=[3])
    before = state_of(module)
    names = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}
    cast_to = {"to": module.to, "method": lambda _: getattr(module, names[dtype])(), "type": module.type}[cast]
    assert cast_to(dtype) is module
    assert module.bias.dtype is dtype
    after = state_of(module)
    del before["bias"], after["bias"]
    assert_same_state(after, before)
    assert module(torch.randn(2, 40, dtype=dtype)).dtype is dtype


def test_requires_grad_reaches_only_the_bias():
    _, module = make()
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    module.requires_grad_(False)
    assert not module(torch.randn(2, 40)).requires_grad
    module.requires_grad_(True)
    assert module(torch.randn(2, 40)).requires_grad
    assert not module.weight.requires_grad


def test_the_linear_is_left_alone():
    linear, module = make()
    before = linear.bias.detach().clone()
    with torch.no_grad():
        module.bias.add_(1.0)
    assert torch.equal(linear.bias, before)
    linear.bias.requires_grad_(False)
    assert not Int8Linear.from_linear(linear.eval()).bias.requires_grad
    assert not Int8Linear.from_linear(linear).training


@pytest.mark.parametrize("keep", [None, [1, 5]])
def test_copies(keep):
    _, module = make(keep_columns=keep)
    x = torch.randn(3, 40) * 5
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(state_of(other), state_of(module))
        assert torch.equal(other(x), module(x))
        assert other.codes.data_ptr() != module.codes.data_ptr()


def test_meta_device():
    module = Int8Linear(40, 12, device="meta")
    assert all(t.is_meta for t in (module.weight, module.weight_scale, module.bias))
    assert module(torch.empty(3, 40, device="meta")).shape == (3, 12)
    empty = module.to_empty(device="cpu")
    assert empty.codes.dtype is torch.int8
    assert not empty.weight.is_meta
    with torch.device("meta"):
        linear = nn.Linear(40, 12)
    quantized = Int8Linear.from_linear(linear, keep_columns=[2])
    assert quantized.weight.is_meta
    _, source = make(keep_columns=[1, 2, 3])
    quantized.load_state_dict(source.state_dict(), assign=True)
    assert_same_state(state_of(quantized), state_of(source))


def test_compile_is_one_graph_for_every_batch_size():
    module = nn.Sequential(make(n=40)[1], nn.ReLU(), make(keep_columns=[1])[1])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (4, 7, 2):
        x, y = (torch.linspace(-9, 9, rows * 40).reshape(rows, 40).requires_grad_() for _ in range(2))
        out, expected = compiled(x), module(y)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


# ---- state dict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("keep", "keep_before"), [(None, None), ([1, 5], None), ([1, 5], [0, 2, 3]), (None, [4])])
def test_state_dict_round_trip(assign, bias, keep, keep_before):
    _, source = make(bias=bias, keep_columns=keep)
    _, target = make(bias=bias, keep_columns=keep_before)
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_same_state(state_of(target), state_of(source))
    x = torch.randn(3, 40) * 5
    assert torch.equal(target(x), source(x))


def test_state_dict_in_a_model_is_strict():
    model = nn.Sequential(make(k=40, n=40)[1], make(keep_columns=[1])[1])
    state = model.state_dict()
    nn.Sequential(Int8Linear(40, 40), Int8Linear(40, 12)).load_state_dict(state)
    missing = {name: value for name, value in state.items() if name != "1.weight_scale"}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.weight_scale"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.zero_point"):
        model.load_state_dict(state | {"1.zero_point": torch.zeros(1)})


BAD_STATE = {
    "float weight": ({"weight": torch.zeros(12, 40)}, r"weight must be int8 \[12, 40\], got float32 \[12, 40\]"),
    "weight shape": ({"weight": torch.zeros(12, 41, dtype=torch.int8)}, r"int8 \[12, 40\], got int8 \[12, 41\]"),
    "half scale": ({"weight_scale": torch.ones(12).half()}, r"weight_scale must be float32 \[12\], got float16 \[12\]"),
    "scale shape": ({"weight_scale": torch.ones(1)}, r"weight_scale must be float32 \[12\], got float32 \[1\]"),
    "scale nan": ({"weight_scale": torch.full((12,), torch.nan)}, "weight_scale has 12 non-finite values of 12"),
    "scale inf": ({"weight_scale": torch.tensor([torch.inf] + [1.0] * 11)}, "weight_scale has 1 non-finite"),
    "scale negative": ({"weight_scale": torch.full((12,), -2.0)}, "negative values, the least -2.0"),
    "bias": ({"bias": torch.zeros(12, dtype=torch.int32)}, r"bias must be float32 or float16 or bfloat16 \[12\]"),
    "slot alone": ({"outlier_slot": torch.full((40,), -1, dtype=torch.int32)}, "go together, got only outlier_slot"),
    "slot range": (
        {"outlier_slot": torch.full((40,), 3, dtype=torch.int32), "outlier_weight": torch.zeros(2, 12)},
        r"outlier_slot must lie in \[-1, 2\), got values from 3 to 3",
    ),
    "kept shape": (
        {"outlier_slot": torch.zeros(40, dtype=torch.int32), "outlier_weight": torch.zeros(1, 40)},
        r"outlier_weight must be .* \[1, 12\], got float32 \[1, 40\]",
    ),
}


@pytest.mark.parametrize("case", BAD_STATE)
def test_bad_state_is_one_clear_error(case):
    change, message = BAD_STATE[case]
    _, module = make()
    before = state_of(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(module.state_dict() | change)
    assert_same_state(state_of(module), before)


# ---- bitsandbytes --------------------------------------------------------------------------------------------------


def bitsandbytes_state(n=12, k=40) -> dict[str, Tensor]:
    """As bitsandbytes' Linear8bitLt writes it: the weight in fp16, its rows' absmax, codes of w * 127 / absmax."""
    weight = torch.randn(n, k).half().float()
    absmax = weight.abs().amax(1)
    codes = torch.round(weight * (127.0 / absmax[:, None])).to(torch.int8)
    state = {"weight": codes, "bias": torch.randn(n).half(), "SCB": absmax}
    return state | {"weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.mark.parametrize("drop", [None, "weight_format"])
def test_loads_bitsandbytes(drop):
    state = bitsandbytes_state()
    expected = state["weight"].double() * state["SCB"].double()[:, None] / 127
    state.pop(drop, None)
    model = nn.Sequential(Int8Linear(40, 12, dtype=torch.float16))
    model.load_state_dict({f"0.{name}": value for name, value in state.items()})
    weight = model[0].dequantize(torch.float32).weight
    torch.testing.assert_close(weight.double(), expected, rtol=2.0**-22, atol=0)  # scale and product, rounded once each
    assert "SCB" in state  # the caller's dict is not changed


@pytest.mark.parametrize(("layout", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "unknown")])
def test_older_bitsandbytes_layouts_are_refused(layout, name):
    state = bitsandbytes_state() | {"weight_format": torch.tensor(layout, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=rf"weight_format is {layout} \({name}\); only 0 \(row\)"):
        Int8Linear(40, 12).load_state_dict(state)


def test_bitsandbytes_round_trip():
    model = nn.Sequential(nn.Embedding(5, 40), make(keep_columns=[1])[1])
    state = to_bitsandbytes_state(model)
    assert set(state) == {"0.weight", "1.weight", "1.bias", "1.SCB", "1.weight_format"}
    assert (state["1.SCB"].dtype, state["1.SCB"].shape) == (torch.float32, (12,))
    assert (state["1.weight_format"].dtype, state["1.weight_format"].item()) == (torch.uint8, 0)
    other = nn.Sequential(nn.Embedding(5, 40), Int8Linear(40, 12))
    other.load_state_dict(state)
    assert torch.equal(other[1].codes, model[1].codes)
    torch.testing.assert_close(other[1].weight_scale, model[1].weight_scale, rtol=2.0**-22, atol=0)
    assert set(to_bitsandbytes_state(model[1])) == {"weight", "bias", "SCB", "weight_format"}
    assert set(model.state_dict()) > {"1.weight_scale", "1.outlier_weight"}  # the model itself is as it was
    with pytest.raises(ValueError, match="Embedding holds no"):
        to_bitsandbytes_state(model[0])


# ---- bad arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match=f"threshold must be 0 .* got {threshold}"):
        Int8Linear(4, 4, threshold=threshold)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights(value):
    linear = nn.Linear(40, 12)
    with torch.no_grad():
        linear.weight[3, [4, 7]] = value
    with pytest.raises(ValueError, match=r"Linear\(in_features=40.*2 of 480 weights are NaN or Inf"):
        Int8Linear.from_linear(linear)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([40], r"\[0, 40\), got ids from 40 to 40"),
        ([-1, 3], r"\[0, 40\), got ids from -1 to 3"),
        ([0.5], "got float32"),
        ([[1]], r"got int64 \[1, 1\]"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        make(keep_columns=columns)


def test_bad_weight_dtype_and_input():
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got float64"):
        make(dtype=torch.float64)
    _, module = make()
    with pytest.raises(RuntimeError, match="41"):
        module(torch.randn(3, 41))
    with pytest.raises(RuntimeError, match="x"):
        module(torch.randn(3, 40, dtype=torch.float64))


def test_import_is_light():
    code = "import sys, octavo; print(sorted({'transformers', 'rich', 'typer', 'accelerate'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
