"""`convert_linears` and back, `prepare_for_eval` of models."""

from __future__ import annotations

import copy
import re
from typing import Any

import octavo
import pytest
import torch
from octavo.nn import LayerScale, SwitchBackLinear, SwitchBackMultiheadAttention
from octavo.switchback import linear as nn_switchback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """A fused projection of a Linear, as timm's and transformers' models have it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), LayerScale(width, 0.1)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.scale(self.mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x + self.attention(x, x, x, need_weights=False)[0])


BLOCK = ["qkv", "proj", "mlp.0", "mlp.2"]
ALL = [f"blocks.{i}.{name}" for i in (0, 1) for name in BLOCK] + ["attention"]
IDS = torch.arange(6).view(2, 3)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_there_and_back():
    model = Model()
    model.blocks[1].qkv.requires_grad_(False)
    calls: list[str] = []
    model.blocks[0].qkv.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, kinds, parameters = copy.deepcopy(model.state_dict()), types(model), dict(model.named_parameters())
    modules = list(model.modules())
    plain = model(IDS)

    result = octavo.convert_linears(model, variant="memory_efficient")
    assert result.converted == ALL and result.left == {}
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert {name: p for name, p in model.named_parameters()}.keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    assert type(model.attention) is SwitchBackMultiheadAttention
    assert type(model.attention.out_proj) is SwitchBackLinear and model.attention.out_proj.variant == "memory_efficient"
    int8 = model(IDS)
    assert calls == ["hook"] * 2
    assert not torch.equal(int8, plain) and (int8 - plain).norm() < 0.05 * plain.norm()
    int8.square().mean().backward()
    assert model.blocks[1].qkv.weight.grad is None and model.blocks[1].mlp[0].weight.grad is not None
    model.zero_grad()

    result = octavo.convert_linears(model, nn.Linear)
    assert result.converted == ALL
    assert types(model) == kinds and str(model) == str(Model())
    assert torch.equal(model(IDS), plain)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all("variant" not in module.__dict__ and "_cache" not in module.__dict__ for module in model.modules())
    model(IDS).square().mean().backward()
    optimizer.step()
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        (["blocks.*"], (), ALL[:-1]),
        ("blocks", (), ALL[:-1]),
        (["blocks.0"], "proj", [name for name in ALL if name.startswith("blocks.0") and "proj" not in name]),
        (["mlp.*"], (), []),
        (["*.mlp.*"], (), [name for name in ALL if "mlp" in name]),
        (["qkv", "attention"], (), ["blocks.0.qkv", "blocks.1.qkv", "attention"]),
        (None, ["blocks.0.*", "lm_head"], [name for name in ALL if not name.startswith("blocks.0")]),
        (["blocks.1.*"], ["proj"], [name for name in ALL if name.startswith("blocks.1") and "proj" not in name]),
        (None, (), [*ALL, "lm_head"]),
    ],
)
def test_patterns(include: list[str] | str | None, exclude: list[str] | str, wanted: list[str]):
    model = Model()
    if not wanted:
        with pytest.raises(ValueError, match=r"include names no linear layer or attention of Model .*: mlp"):
            octavo.convert_linears(model, include=include, exclude=exclude)
        return
    assert octavo.convert_linears(model, include=include, exclude=exclude).converted == wanted
    changed = [name for name, m in model.named_modules() if isinstance(m, nn_switchback.Int8Weight)]
    assert sorted(name for name in changed if name != "attention.out_proj") == sorted(wanted)
    assert octavo.convert_linears(model, nn.Linear, include=include, exclude=exclude).converted == wanted


def test_a_tied_head_stays_tied():
    model = Model()
    octavo.convert_linears(model, exclude=())
    assert model.lm_head.weight is model.embed.weight
    model(IDS).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    out = model.lm_head(torch.eye(16)[:4])
    assert (out - model.embed.weight.t()[:4]).abs().max() < 0.02 * model.embed.weight.abs().max()


def test_converted_twice():
    model = Model()
    octavo.convert_linears(model, include=["blocks.0.*"])
    again = octavo.convert_linears(model, include=["blocks.0.*"])
    assert again.converted == [] and set(again.left.values()) == {"converted already"}
    both = octavo.convert_linears(model)
    assert both.converted == ALL[4:] and list(both.left) == ALL[:4]
    kinds = types(model)
    with pytest.raises(ValueError, match=r"'blocks.0.qkv' is converted already, with variant='switchback': go back"):
        octavo.convert_linears(model, variant="vectorwise")
    assert types(model) == kinds


def test_shared_modules_are_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert octavo.convert_linears(model).converted == ["0"]
    assert model[0] is model[2] is shared and type(shared) is SwitchBackLinear
    assert octavo.convert_linears(shared, nn.Linear).converted == [""]
    assert type(model[2]) is nn.Linear


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_says_why():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "special": Special(4, 4),
            "cross": nn.MultiheadAttention(4, 2, kdim=6, vdim=6),
            "biased": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "zero": nn.MultiheadAttention(4, 2, add_zero_attn=True),
        }
    )
    result = octavo.convert_linears(model)
    assert result.converted == ["plain"]
    assert result.left == {
        "special": "its type is Special: what a subclass adds would be lost",
        "cross": "its keys or values have another width than its queries",
        "biased": "it has add_bias_kv or add_zero_attn",
        "zero": "it has add_bias_kv or add_zero_attn",
    }
    with pytest.raises(ValueError, match=r"there is no torch.nn.Linear or torch.nn.MultiheadAttention to convert"):
        octavo.convert_linears(model["special"])


def test_errors_leave_the_model_as_it_was():
    model = Model()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("unknown variant 'int4'", {"variant": "int4"}),
        ("unknown option 'threshold'; known: variant, k_split, stochastic_rounding", {"threshold": 6.0}),
        ("k_split is of the weight gradient", {"k_split": 5}),
        ("go with it): nothing", {"include": ["attention", "nothing"]}),
        ("exclude names no linear layer or attention of Model (the projections", {"exclude": ["nothing"]}),
        ("go with it): *out_proj", {"exclude": ["*out_proj"]}),
        ("include must be a list of patterns, got [3]", {"include": [3]}),
        ("to convert in Model; excluded: lm_head", {"include": ["lm_head"]}),
        ("stochastic_rounding must be True or False, got 'yes'", {"stochastic_rounding": "yes"}),
        ("unknown option 'variant'; known: none for torch.nn.Linear", {"cls": nn.Linear, "variant": "switchback"}),
        ("cls must be octavo.nn.SwitchBackLinear, or torch.nn.Linear to go back, got <class 'octavo.int8", {
            "cls": octavo.nn.Int8Linear
        }),
        ("there is no SwitchBackLinear to convert in Model", {"cls": nn.Linear}),
    ]  # fmt: skip
    for message, arguments in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            octavo.convert_linears(model, **arguments)
    model.blocks[1].mlp[2].double()
    with pytest.raises(ValueError, match=r"blocks.1.mlp.2: weight must be float32, float16 or bfloat16, got float64"):
        octavo.convert_linears(model)
    assert types(model) == types(Model())
    wide = nn.Sequential(nn.Linear(4, 4), nn.Linear(131072, 1, device="meta"))
    with pytest.raises(ValueError, match=r"1: weight of shape \[1, 131072\] is wider than 131071"):
        octavo.convert_linears(wide)
    with pytest.raises(ValueError, match=r"there is no torch.nn.Linear"):
        octavo.convert_linears(nn.Sequential(nn.ReLU()))


def test_devices_may_differ():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    assert octavo.convert_linears(model).converted == ["0", "1"]
    assert model[1](torch.randn(2, 4, device="meta")).shape == (2, 4)
    with pytest.raises(RuntimeError, match="device"):
        model[1](torch.randn(2, 4))


def test_torch_encoder_layers(monkeypatch: pytest.MonkeyPatch):
    """In evaluation torch's layer has a kernel that would go past the modules, and read int8 weights as floats."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    plain = copy.deepcopy(encoder).eval()
    calls: list[str] = []
    forward = SwitchBackLinear.forward

    def counted(self: SwitchBackLinear, input: Tensor) -> Tensor:
        calls.append("int8")
        return forward(self, input)

    monkeypatch.setattr(SwitchBackLinear, "forward", counted)
    for include in (["linear1", "linear2"], None):
        octavo.convert_linears(encoder, include=include)
        encoder.train()
        trained = encoder(x).detach()
        with torch.no_grad():
            calls.clear()
            evaluated = encoder.eval()(x)
            assert len(calls) == (4 if include else 6)
            # torch's float attention may round otherwise in evaluation, and a code may then be the next one.
            assert torch.allclose(evaluated, trained, atol=0.05)
            assert 0 < (evaluated - plain(x)).abs().max() < 0.1
            prepared = copy.deepcopy(encoder)
            octavo.prepare_for_eval(prepared)
            assert torch.equal(prepared(x), evaluated)
        octavo.convert_linears(encoder, nn.Linear)
        with torch.no_grad():
            assert torch.allclose(encoder.eval()(x), plain(x), atol=1e-5)
        assert encoder.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("include", [None, ["layers.1.*"], ["layers.1.linear*"], ["*.self_attn"]])
@pytest.mark.parametrize("kind", ["encoder", "transformer"])
def test_padding_in_torch_encoders(kind: str, include: list[str] | None):
    """With a padding mask torch's encoder would make nested tensors in evaluation, for that kernel alone."""
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        model: nn.Module = nn.TransformerEncoder(layer, 2)
        assert model.use_nested_tensor
    else:
        model = nn.Transformer(16, 2, 2, 1, 32, dropout=0.0, batch_first=True)
        include = None if include is None else [f"*{pattern}" for pattern in include]
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def run() -> Tensor:
        with torch.no_grad():
            if kind == "encoder":
                return model(x, src_key_padding_mask=padding)
            return model(x, x, src_key_padding_mask=padding)

    states = [dict(module.__dict__) for module in model.modules()]
    plain = run() if kind == "transformer" else model.eval()(x, src_key_padding_mask=padding).detach()
    octavo.convert_linears(model, include=include)
    model.eval()
    int8 = run()
    kept = ~padding if kind == "encoder" else torch.ones(2, 5, dtype=torch.bool)
    assert 0 < (int8[kept] - plain[kept]).abs().max() < 0.2
    prepared = copy.deepcopy(model)
    octavo.prepare_for_eval(prepared)
    model, original = prepared, model
    assert torch.equal(run(), int8)
    model = original
    octavo.convert_linears(model, nn.Linear)
    for module, state in zip(model.modules(), states, strict=True):
        assert module.__dict__.keys() == state.keys()
        assert all(
            module.__dict__[key] == state[key]
            for key in ("use_nested_tensor", "activation_relu_or_gelu")
            if key in state
        )


def test_going_back_leaves_what_it_would_destroy():
    class Mine(SwitchBackLinear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Mine(4, 4), nn.Linear(4, 4))
    octavo.convert_linears(model, include=["0", "2"])
    torch.nn.utils.parametrizations.weight_norm(model[0])
    result = octavo.convert_linears(model, nn.Linear)
    assert result.converted == ["2"] and list(result.left) == ["0", "1"]
    assert result.left["1"] == "its type is Mine: what a subclass adds would be lost"
    assert model(torch.randn(2, 4)).shape == (2, 4) and type(model[1]) is Mine


@pytest.mark.parametrize("damage", ["nan", "nan in out_proj", "fp8", "weight_norm", "parametrization", "prune"])
def test_prepare_for_eval_changes_all_or_nothing(damage: str):
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    if damage == "weight_norm":
        torch.nn.utils.weight_norm(model[2])
    octavo.convert_linears(model, include=["0", "1"])
    octavo.convert_linears(model, include=["2"], variant="fp8" if damage == "fp8" else "switchback")
    with torch.no_grad():
        if damage == "nan":
            model[2].weight[0, 0] = float("nan")
        elif damage == "nan in out_proj":
            model[1].out_proj.weight[0, 0] = float("nan")
    if damage == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(model[2])
    elif damage == "prune":
        prune.random_unstructured(model[2], "weight", 0.5)
    message = {
        "nan": "'2': 1 of 16 weights are NaN or Inf",
        "nan in out_proj": "'1': out_proj: 1 of 16 weights are NaN or Inf",
        "fp8": "'2': variant fp8 is a simulation",
    }.get(damage, "'2': weight is no parameter but computed")
    with pytest.raises(ValueError, match=message):
        octavo.prepare_for_eval(model)
    assert not any(module.prepared for module in model.modules() if isinstance(module, nn_switchback.Int8Weight))
    if "out_proj" in damage:
        with pytest.raises(ValueError, match="out_proj: 1 of 16"):
            model[1].prepare_for_eval()
        assert not model[1].prepared


@pytest.mark.parametrize("how", ["alone", "replaced", "named before", "parametrized"])
def test_an_output_projection_that_went_its_own_way(how: str):
    attention = nn.MultiheadAttention(16, 4)
    model: nn.Module = nn.ModuleDict({"x": attention.out_proj, "a": attention}) if "named" in how else attention
    octavo.convert_linears(model)
    if how == "alone":
        octavo.convert_linears(attention.out_proj, nn.Linear)
    elif how == "replaced":
        attention.out_proj = nn.Linear(16, 16)
    elif how == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(attention.out_proj)
    if how in ("alone", "replaced"):
        with pytest.raises(ValueError, match="out_proj is a Linear, which has no int8 weight"):
            octavo.prepare_for_eval(model)
        assert not attention.prepared
    x = torch.randn(3, 2, 16)
    if how == "parametrized":
        with pytest.raises(ValueError, match="its output projection is a ParametrizedSwitchBackLinear"):
            octavo.convert_linears(model, nn.Linear)
    else:
        octavo.convert_linears(model, nn.Linear)
        assert type(attention) is nn.MultiheadAttention and isinstance(attention.out_proj, nn.Linear)
        assert not isinstance(attention.out_proj, nn_switchback.Int8Weight)
    attention(x, x, x)


def test_parts_of_an_encoder_converted_one_by_one():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    before = [dict(module.__dict__) for module in encoder.modules()]
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for layer in encoder.layers:
        octavo.convert_linears(layer.linear1)
    prepared = copy.deepcopy(encoder).eval()
    octavo.prepare_for_eval(prepared)
    with torch.no_grad():
        assert prepared(x, src_key_padding_mask=padding).isfinite().all()
    octavo.convert_linears(encoder)
    for layer in encoder.layers:
        octavo.convert_linears(layer, nn.Linear)
    with pytest.raises(ValueError, match="there is no SwitchBackLinear"):
        octavo.convert_linears(encoder, nn.Linear)  # which at least allows torch's own kernels again
    assert [module.__dict__.keys() for module in encoder.modules()] == [state.keys() for state in before]


def test_others_say_what_to_do_with_converted_layers(tmp_path: Any):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    octavo.convert_linears(model)
    with pytest.raises(ValueError, match=r"0: it trains in int8; octavo.convert_linears\(model, torch.nn.Linear\)"):
        octavo.add_lora(model)
    with pytest.raises(ValueError, match=r"0: it trains in int8; octavo.convert_linears"):
        octavo.quantize_model(model)
    octavo.convert_linears(model, nn.Linear, include=["0"])
    octavo.quantize_model(model)
    model[1].prepare_for_eval()
    with pytest.raises(ValueError, match="1 was prepared for evaluation by prepare_for_eval: load_quantized does not"):
        octavo.save_quantized(model, tmp_path / "model")
    adapted = nn.Sequential(nn.Linear(64, 64))
    octavo.add_lora(adapted)
    octavo.convert_linears(adapted)
    octavo.prepare_for_eval(adapted)
    with pytest.raises(ValueError, match="its base was prepared for evaluation, and is int8 without its float weight"):
        octavo.merge_adapter(adapted)


def test_prepare_for_eval_of_a_model():
    model = Model()
    with pytest.raises(ValueError, match="there is no SwitchBackLinear in Model: convert_linears makes them"):
        octavo.prepare_for_eval(model)
    octavo.convert_linears(model)
    model.eval()
    with torch.no_grad():
        before = model(IDS)
        assert octavo.prepare_for_eval(model) == [*ALL, "attention.out_proj"]
        assert torch.equal(model(IDS), before)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert dtypes["attention.in_proj_weight"] is torch.int8 and dtypes["blocks.0.qkv.weight"] is torch.int8
    assert dtypes["attention.in_proj_weight_scale"] is torch.float32
    with pytest.raises(ValueError, match=r"'blocks.0.qkv' was prepared for evaluation: its float weight is gone"):
        octavo.convert_linears(model, nn.Linear)
    bad = Model()
    octavo.convert_linears(bad, variant="fp8")
    with pytest.raises(ValueError, match=r"'blocks.0.qkv': variant fp8 is a simulation"):
        octavo.prepare_for_eval(bad)
