"""LoRALinear as a module: what it computes, its gradients, its adapters, merging, and what must never change it."""

import copy
import math
import pickle

import pytest
import torch
from lora_layers import BASES, REQUANTIZED, base_layer, dense, train_by_hand
from octavo import quantize_model
from octavo.nn import Int8Linear, LoRALinear, NF4Linear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(kind="int8", rank=4, alpha=8.0, dropout=0.0, dtype=torch.float32, bias=True, **options) -> LoRALinear:
    layer = LoRALinear(base_layer(kind, bias=bias, dtype=dtype), rank, alpha, dropout, **options)
    return train_by_hand(layer, layer.active_adapter)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype
        assert torch.equal(a[name], b[name]), name


# ---- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_adapter_changes_nothing(kind, dtype):
    base = base_layer(kind, dtype=dtype)
    layer = LoRALinear(base, 4, 8, dropout=0.5)
    x = torch.randn(2, 3, 64, dtype=dtype)
    assert torch.equal(layer.train()(x), base(x))
    assert float(layer.lora_A["default"].detach().std()) > 0.01
    assert layer.lora_A["default"].dtype is torch.float32


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [True, False])
def test_formula(kind, bias):
    layer = make(kind, rank=4, alpha=6.0, bias=bias)
    x = torch.randn(2, 3, 64)
    a, b = (p["default"].detach().double() for p in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer(x).double() + 6.0 / 4 * x.double() @ a.t() @ b.t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x[0, 0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 3, 48)
    assert not layer(x)._is_view() and not layer(x[0])._is_view()  # which FSDP2 warns of


def test_rslora_and_default_alpha():
    assert make(rank=16, alpha=8.0, use_rslora=True).adapters["default"].scaling == 2.0
    assert make(rank=16, alpha=8.0).adapters["default"].scaling == 0.5
    assert make(rank=16, alpha=None).adapters["default"].scaling == 1.0
    layer, other = make(alpha=8.0), make(alpha=8.0, use_rslora=True)
    assert not torch.allclose(layer.delta(), other.delta())
    torch.testing.assert_close(other.delta(), 4.0 * other.lora_B["default"].detach() @ other.lora_A["default"].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_16_bit_is_as_exact_as_torch(kind, dtype):
    layer = make(kind, dtype=dtype)
    x = torch.randn(32, 64, dtype=dtype)
    a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    y = layer.base_layer(x)
    exact = y.double() + 2.0 * x.double() @ a.double().t() @ b.double().t()
    plain = y + 2.0 * F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
    out = layer(x)
    assert out.dtype is dtype
    assert float((out - exact).detach().norm()) <= 2 * float((plain - exact).detach().norm())


@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind):
    layer = make(kind)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert out.dtype is torch.bfloat16
    assert layer.lora_B["default"].grad.dtype is torch.float32
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.1)


def test_dropout_is_of_the_adapter_alone_and_of_training():
    layer = make(dropout=0.5, alpha=4.0)
    x = torch.randn(8, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = layer.base_layer(x) + dropped @ layer.lora_A["default"].t() @ layer.lora_B["default"].t()
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, layer.eval()(x))


@pytest.mark.parametrize("kind", BASES)
def test_gradients(kind):
    layer = make(kind, rank=3)
    x = torch.randn(5, 64, requires_grad=True)
    upstream = torch.randn(5, 48)
    layer(x).backward(upstream)
    a, b = (p["default"].detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    z = x.detach().double().requires_grad_()
    (8.0 / 3 * z @ a.t() @ b.t()).backward(upstream.double())
    torch.testing.assert_close(layer.lora_A["default"].grad.double(), a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_B["default"].grad.double(), b.grad, rtol=1e-4, atol=1e-5)
    through_base = x.detach().clone().requires_grad_()
    layer.base_layer(through_base).backward(upstream)
    torch.testing.assert_close(x.grad.double(), z.grad + through_base.grad.double(), rtol=1e-4, atol=1e-4)


def test_only_the_adapter_requires_gradients():
    for kind in BASES:
        layer = make(kind)
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"lora_A.default", "lora_B.default"}


@pytest.mark.parametrize("kind", BASES)
def test_training_changes_the_adapter_and_nothing_else(kind):
    layer = make(kind)
    target, x = torch.randn(16, 48), torch.randn(16, 64)
    before = state_of(layer)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(30):
        layer.train(step != 10)  # an evaluation in between
        loss = (layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in state_of(layer).items() if not torch.equal(value, before[name])}
    assert changed == {"lora_A.default", "lora_B.default"}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    layer = make(kind, dropout=0.3)
    gradients = []
    for recompute in (False, True):
        x = torch.linspace(-2, 2, 320).reshape(5, 64).requires_grad_()
        torch.manual_seed(3)
        out = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
    assert len(gradients[0]) == 3
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", BASES)
def test_compile_is_one_graph(kind):
    layer = make(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        x, y = (torch.linspace(-3, 3, rows * 64).reshape(rows, 64).requires_grad_() for _ in range(2))
        out, expected = compiled(x), layer(y)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    layer.add_adapter("other")
    train_by_hand(layer, "other", std=1.0)
    before = compiled(x).detach()
    layer.set_adapter("other")
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.allclose(compiled(x), before)
    layer.set_adapter(None)
    torch.testing.assert_close(compiled(x), layer.base_layer(x))
    layer.set_adapter("other")
    layer.eval().merge()
    torch.testing.assert_close(compiled(x), layer(x))


# ---- copies and states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_copies_and_state_dicts(kind):
    layer = make(kind)
    layer.add_adapter("second", 2, 1.0)
    x = torch.randn(3, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_state(state_of(other), state_of(layer))
        assert torch.equal(other(x), layer(x))
        assert other.lora_A["default"].data_ptr() != layer.lora_A["default"].data_ptr()
        assert other.adapters == layer.adapters
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]
    fresh = LoRALinear(copy.deepcopy(layer.base_layer), 4, 8.0)
    fresh.add_adapter("second", 2, 1.0)
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(layer.state_dict())  # strict
    assert_same_state(state_of(fresh), state_of(layer))
    assert torch.equal(fresh(x), layer(x))
    assert {"lora_A.default", "lora_B.second"} < set(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B\.second"):
        fresh.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "lora_B.second"})


def test_dtype_changes_leave_quantized_bases():
    layer = make("int8")
    before = state_of(layer.base_layer)
    layer.to(torch.bfloat16)
    assert layer.lora_A["default"].dtype is torch.bfloat16
    assert torch.equal(layer.base_layer.weight_scale, before["weight_scale"])
    assert layer(torch.randn(2, 64).bfloat16()).dtype is torch.bfloat16


def test_meta_device():
    layer = LoRALinear(Int8Linear(64, 48, device="meta"), 4)
    assert layer.lora_A["default"].is_meta and layer.lora_B["default"].is_meta
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 48)


def test_a_base_may_be_quantized_later():
    model = nn.Sequential(make("linear"))
    x = torch.randn(4, 64)
    before = model(x)
    quantize_model(model, progress=False)
    assert isinstance(model[0].base_layer, Int8Linear)
    assert float((model(x) - before).detach().norm()) < 0.02 * float(before.detach().norm())


# ---- several adapters ----------------------------------------------------------------------------------------------


def test_switching():
    layer = make("int8", adapter="a")
    layer.add_adapter("b", rank=2, alpha=1.0)
    train_by_hand(layer, "b")
    x = torch.randn(3, 64)
    y = layer(x)
    layer.set_adapter("b")
    product = x @ layer.lora_A["b"].t() @ layer.lora_B["b"].t()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.5 * product)
    assert not torch.allclose(layer(x), y)
    layer.set_adapter(None)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_adapter("a")
    assert torch.equal(layer(x), y)
    layer.delete_adapter("a")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert list(layer.adapters) == ["b"]
    assert set(layer.state_dict()) & {"lora_A.a", "lora_B.a"} == set()


def test_repr():
    text = repr(make("int8", adapter="a", dropout=0.1))
    assert "a: rank=4, alpha=8, dropout=0.1; active=a" in text
    assert "Int8Linear(in_features=64" in text


BAD_NUMBERS = {
    "rank 0": ({"rank": 0}, "rank must be an integer of 1 or more, got 0"),
    "rank -1": ({"rank": -1}, "got -1"),
    "rank float": ({"rank": 2.0}, r"got 2\.0"),
    "rank bool": ({"rank": True}, "got True"),
    "alpha nan": ({"alpha": math.nan}, "alpha must be a positive number, got nan"),
    "alpha inf": ({"alpha": math.inf}, "got inf"),
    "alpha 0": ({"alpha": 0.0}, r"got 0\.0"),
    "dropout 1": ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
    "dropout nan": ({"dropout": math.nan}, "got nan"),
    "dtype": ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, got torch.int8"),
    "name dot": ({"adapter": "a.b"}, r"letters, digits, '_' and '-' only, got 'a\.b'"),
    "name empty": ({"adapter": ""}, "got ''"),
    "name taken": ({"adapter": "keys"}, "'keys' cannot be the name"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_bad_numbers(case):
    arguments, message = BAD_NUMBERS[case]
    base = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **arguments)
    assert base.weight.requires_grad
    layer = make("int8")
    before = state_of(layer)
    arguments = {"name" if key == "adapter" else key: value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        layer.add_adapter(**{"name": "new", **arguments})
    assert_same_state(state_of(layer), before)


def test_bad_bases_and_names():
    with pytest.raises(TypeError, match=r"a layer of octavo\.nn, got Conv1d"):
        LoRALinear(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match="got LoRALinear: give it another by add_adapter"):
        LoRALinear(make("int8"))
    layer = make("int8")
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        layer.add_adapter("default")
    for call in (layer.set_adapter, layer.delete_adapter, layer.delta):
        with pytest.raises(ValueError, match="there is no adapter 'x'; known: default"):
            call("x")


# ---- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_merge_is_the_exact_matrix_and_unmerge_restores_to_the_bit(kind, dtype):
    layer = make(kind, dtype=dtype).eval()
    x = torch.randn(7, 64, dtype=dtype)
    before, y = state_of(layer), layer(x)
    exact = (dense(layer.base_layer).double() + layer.delta().double()).float()
    report = layer.merge()
    merged = layer.merged_layer
    assert type(merged) is nn.Linear and layer.is_merged
    assert merged.weight.dtype is dtype
    # fp32 sums, rounded once: a double sum rounded to fp32 differs in the last place of fp32 at most.
    near = torch.finfo(dtype).eps / 2 + 2.0**-22
    assert bool(((merged.weight.float() - exact).abs() <= near * exact.abs() + 1e-7).all())
    assert torch.equal(merged.bias, layer.base_layer.bias)
    assert torch.equal(layer(x), F.linear(x, merged.weight, merged.bias))
    assert (report.method, report.adapter) == (None, "default")
    lost = (merged.weight.double() - exact.double()).norm()
    assert report.error == pytest.approx(float(lost / exact.double().norm()), rel=1e-3, abs=1e-7)
    assert report.delta_error == pytest.approx(float(lost / layer.delta().double().norm()), rel=1e-3, abs=1e-6)
    assert (report.error == 0.0) == (dtype is torch.float32)
    assert_same_state(state_of(layer), before)  # merged or not
    layer.unmerge()
    assert not layer.is_merged
    assert_same_state(state_of(layer), before)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", REQUANTIZED)
@pytest.mark.parametrize("bias", [True, False])
def test_merge_requantized_reports_the_error(kind, bias):
    layer = make(kind, bias=bias, dtype=torch.bfloat16).eval()
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    before, y = state_of(layer), layer(x)
    report = layer.merge(requantize=True)
    merged = layer.merged_layer
    assert type(merged) is type(layer.base_layer) and report.method == kind
    assert (merged.bias is None) == (not bias) and (not bias or merged.bias.dtype is torch.bfloat16)
    exact = dense(layer.base_layer) + layer.delta()
    again = type(merged).from_linear(_as_linear(exact))
    assert torch.equal(dense(again), dense(merged))
    lost = float((dense(merged) - exact).norm())
    assert report.error == pytest.approx(lost / float(exact.norm()), rel=1e-5) and report.error > 1e-4
    assert report.delta_error == pytest.approx(lost / float(layer.delta().norm()), rel=1e-5)
    assert torch.equal(layer(x), merged(x))
    layer.unmerge()
    assert_same_state(state_of(layer), before)
    assert torch.equal(layer(x), y)


def _as_linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


def test_requantizing_keeps_the_settings():
    base = Int8Linear.from_linear(nn.Linear(64, 48), threshold=3.0, keep_columns=[5, 9])
    layer = train_by_hand(LoRALinear(base, 4)).eval()
    layer.merge(requantize=True)
    assert layer.merged_layer.threshold == 3.0
    assert layer.merged_layer.outlier_slot[[5, 9]].tolist() == [0, 1]
    exact = dense(base) + layer.delta()
    assert torch.equal(dense(layer.merged_layer)[:, [5, 9]], exact[:, [5, 9]])
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    base = NF4Linear.from_linear(linear, "fp4", 128, double_quant=True)
    layer = train_by_hand(LoRALinear(base, 4)).eval()
    layer.merge(requantize=True)
    assert layer.merged_layer.configuration() == base.configuration()
    layer.unmerge()
    layer.merge()
    assert layer.merged_layer.weight.dtype is torch.bfloat16


def test_merge_moves_and_copies():
    layer = make("int8", bias=False).eval()
    layer.merge(dtype=torch.bfloat16)
    assert layer.merged_layer.weight.dtype is torch.bfloat16
    other = copy.deepcopy(layer)
    assert other.is_merged and other.merged_layer is not layer.merged_layer
    layer.to("meta")
    assert layer.merged_layer.weight.is_meta
    assert not other.merged_layer.weight.is_meta


def test_what_merged_layers_refuse():
    layer = make("int8")
    layer.add_adapter("b")
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()
    layer.merge()
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="adapter 'default' is merged and would not learn"):
        layer.train()(x)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    for call in (lambda: layer.set_adapter("b"), lambda: layer.delete_adapter("b"), layer.merge,
                 lambda: layer.add_adapter("c")):  # fmt: skip
        with pytest.raises(RuntimeError, match="adapter 'default' is merged; call unmerge"):
            call()
    assert list(layer.adapters) == ["default", "b"]


def test_merges_that_cannot_be():
    layer = make("spqr")
    with pytest.raises(ValueError, match="SpQRLinear cannot be quantized again without calibration data"):
        layer.merge(requantize=True)
    assert not layer.is_merged
    layer.set_adapter(None)
    with pytest.raises(ValueError, match="no adapter is active"):
        layer.merge()
    layer = make("int8")
    with torch.no_grad():
        layer.lora_B["default"][3] = math.nan
    with pytest.raises(ValueError, match=r"'default': 64 of 3072 merged weights are NaN or Inf in torch\.float32"):
        layer.merge()
    with torch.no_grad():
        layer.lora_B["default"].fill_(1e6)
    with pytest.raises(ValueError, match=r"NaN or Inf in torch\.float16"):
        layer.merge(dtype=torch.float16)
    assert not layer.is_merged
