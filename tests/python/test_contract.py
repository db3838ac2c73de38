"""The contract of every method in the registry: a new one is tested by being registered, on its own `Method.trial`."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import octavo
import pytest
import torch
from octavo.core import method as registry
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import register
from octavo.lora.adapters import base_quantization
from readable_weight import assert_reads_as_a_weight
from ternary import TernaryLinear, make_ternary
from torch import nn


@dataclass
class Case:
    """A method, or an alias of one, with its trial."""

    name: str

    def __post_init__(self):
        self.method, fixed = registry.find_method(self.name)
        self.trial = self.method.trial()
        # The settings as quantize_model gets them: an alias brings its own.
        self.settings = {key: value for key, value in self.trial.settings.items() if key not in fixed}
        self.all_settings = {**self.settings, **fixed}

    def model(self):
        return self.trial.model().eval()

    def quantize(self, model=None, **more):
        """The quantized model, and the report on it."""
        model = self.model() if model is None else model
        calibration = self.trial.calibration() if self.trial.calibration else None
        given = {"calibration": calibration, "progress": False, **self.settings, **more}
        return model, octavo.quantize_model(model, self.name, **given)

    def layers(self, model):
        found = {name: m for name, m in model.named_modules() if isinstance(m, LowBitLinear)}
        assert all(type(layer) is self.method.layer for layer in found.values())
        return found


class Two(nn.Module):
    """The trial's model twice: two subtrees."""

    def __init__(self, case):
        super().__init__()
        self.first, self.second = case.trial.model(), case.trial.model()

    def forward(self, x):
        return self.first(x) + self.second(x)


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def run(model, x):
    return model(x)


def linears(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear]


def tensors_of(layer):
    found = {name: layer._parameters.get(name, layer._buffers.get(name)) for name in layer.tensors}
    return {name: value for name, value in found.items() if value is not None}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


def train(model, x, steps=2):
    """A few steps of what requires gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# ---- the contract ----------------------------------------------------------------------------------------------------

CONTRACT = {}


def contract(check):
    CONTRACT[check.__name__.removeprefix("check_")] = check
    return check


@contract
def check_report(case, tmp_path):
    """Every layer is quantized, and the report has the method's own settings and figures, and no others."""
    wanted = linears(case.model())
    model, report = case.quantize()
    layers = case.layers(model)
    assert [layer.name for layer in report.layers] == list(layers) == wanted and len(wanted) >= 2
    assert report.method == case.method.name
    assert report.settings == case.method.settings(case.all_settings).to_dict()
    for name, value in case.all_settings.items():
        assert getattr(report, name) == value
    for other in registry.methods().values():
        for name in {*other.setting_names()} - report.settings.keys():
            with pytest.raises(AttributeError, match=name):
                getattr(report, name)
    for entry in report.layers:
        layer = layers[entry.name]
        assert entry.shape == (layer.out_features, layer.in_features)
        assert entry.bytes_after < entry.bytes_before
        assert layer.figures().items() <= entry.figures.items()
        for name, value in entry.figures.items():
            assert getattr(entry, name) == value
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.method in str(report) and report.description in str(report)


@contract
def check_error_bound(case, tmp_path):
    """The output is near the unquantized model's, and is not it; bf16 adds no more than its own rounding."""
    x = case.trial.inputs()
    exact = run(case.model(), x)
    model, _ = case.quantize()
    out = run(model, x)
    assert out.dtype is torch.float32
    assert 0.0 < relative(out, exact) <= case.trial.bound
    low = run(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert low.dtype is torch.bfloat16
    assert relative(low, exact) <= case.trial.bound + 0.02


@contract
def check_foreign_setting(case, tmp_path):
    """A setting of no method is refused in the one wording, and nothing is changed."""
    model = case.model()
    with pytest.raises(ValueError, match="has no setting") as caught:
        case.quantize(model, no_such_setting=1)
    known = ", ".join(case.method.setting_names())
    assert str(caught.value) == f"{case.method.name} has no setting no_such_setting; it has {known or 'none'}"
    assert linears(model) == linears(case.model())


@contract
def check_skip(case, tmp_path):
    """Layers are left alone by one grammar of names, patterns and subtrees; a pattern that means none is named."""
    of_first = [name for name in linears(Two(case)) if name.startswith("first.")]
    for skip in ("first", "first.*", ["fir*"], of_first):
        model, report = case.quantize(Two(case).eval(), skip=skip)
        assert linears(model) == of_first
        assert report.skipped == dict.fromkeys(of_first, "as asked")
        assert {*case.layers(model)} == {name.replace("first", "second") for name in of_first}
    leaf = of_first[0].rpartition(".")[2]
    model, report = case.quantize(Two(case).eval(), skip=leaf)
    assert {*report.skipped} == {f"first.{leaf}", f"second.{leaf}"}
    model = Two(case).eval()
    with pytest.raises(ValueError, match=r"skip names no linear layer of Two: nothing_here"):
        case.quantize(model, skip=["first", "nothing_here"])
    assert not case.layers(model)


@contract
def check_gradient(case, tmp_path):
    """Gradients of x and bias are those of the dequantized layer."""
    for layer in case.layers(case.quantize()[0]).values():
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(7, layer.in_features, generator=generator).requires_grad_()
        g = torch.randn(7, layer.out_features, generator=generator)
        layer(x).backward(g)
        assert relative(x.grad, g @ layer.dequantize(torch.float32).weight) < 0.02
        if layer.bias is not None:
            assert relative(layer.bias.grad, g.sum(0)) < 1e-6
        assert not any(tensor.requires_grad for tensor in tensors_of(layer).values())


@contract
def check_state_dict(case, tmp_path):
    """A fresh module made of the configuration alone takes the state: assigned, copied, by way of a file's JSON."""
    for layer in case.layers(case.quantize()[0]).values():
        config = json.loads(json.dumps(layer.configuration(), allow_nan=False))
        dtype = None if layer.bias is None else layer.bias.dtype
        state = layer.state_dict()
        assert {*state} == layer.tensor_names(config)
        assert not layer.errors(state, config)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(4))
        for assign in (False, True):
            fresh = case.method.layer.from_configuration(config, dtype)
            assert all(tensor.is_meta for tensor in fresh.state_dict().values())
            told = layer.read_from(state)  # what the tensors say is not known before they are there
            assert fresh.configuration() | told == layer.configuration()
            if not assign:
                fresh.to_empty(device="cpu")
            fresh.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
            assert fresh.configuration() == layer.configuration()
            assert_same_bits(fresh.state_dict(), state)
            assert torch.equal(run(fresh, x), run(layer, x))
            assert torch.equal(fresh.dequantize().weight, layer.dequantize().weight)
        missing = {name: value for name, value in state.items() if name != layer.tensors[-1]} | {layer.key: x}
        with pytest.raises(RuntimeError, match=type(layer).__name__):
            layer.load_state_dict(missing)
        assert_same_bits(layer.state_dict(), state)


@contract
def check_save_load(case, tmp_path):
    """A saved directory gives the same bits, in a model whose parameters are real or on the meta device."""
    model, _ = case.quantize()
    octavo.save_quantized(model, tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "octavo.json").read_text())
    assert manifest["method"] == case.method.stored
    with torch.device("meta"):
        meta = case.model()
    for target in (case.model, case.model(), meta):
        loaded = octavo.load_quantized(tmp_path / "saved", target)
        assert_same_bits(loaded.state_dict(), model.state_dict())
        assert case.layers(loaded).keys() == case.layers(model).keys()
        assert torch.equal(run(loaded, case.trial.inputs()), run(model, case.trial.inputs()))


@contract
def check_weight(case, tmp_path):
    """The layers are torch.nn.Linear with a float weight to read, the one that they multiply by, and not to write."""
    model, _ = case.quantize()
    for layer in case.layers(model).values():
        before = {name: tensor.clone() for name, tensor in tensors_of(layer).items()}
        assert_reads_as_a_weight(layer)
        assert_same_bits(tensors_of(layer), before)
        assert layer.half().weight.dtype is torch.float16
        meta = copy.deepcopy(layer).to("meta")
        assert meta.weight.is_meta and (meta.weight @ meta.weight.t()).is_meta


@contract
def check_copies(case, tmp_path):
    """deepcopy and pickle give the same layers, in memory of their own."""
    model, _ = case.quantize()
    x = case.trial.inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(twin.state_dict(), model.state_dict())
        assert torch.equal(run(twin, x), run(model, x))
        for name, layer in case.layers(twin).items():
            assert layer.configuration() == model.get_submodule(name).configuration()
        with torch.no_grad():
            for layer in case.layers(twin).values():
                for tensor in tensors_of(layer).values():
                    tensor.zero_()
        assert torch.equal(run(model, x), run(case.quantize()[0], x))


@contract
def check_dtypes_and_devices(case, tmp_path):
    """A change of dtype leaves codes and scales alone; a move takes all tensors along, with their dtypes."""
    for change in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        for layer in case.layers(case.quantize()[0]).values():
            before = {name: value.clone() for name, value in tensors_of(layer).items()}
            change(layer)
            after = tensors_of(layer)
            assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
            if not all(value.is_meta for value in layer.state_dict().values()):
                assert_same_bits(after, before)
                assert layer.bias is None or layer.bias.dtype is not torch.float32


@contract
def check_compile(case, tmp_path):
    """torch.compile takes the whole model in one graph, forward and backward."""
    model, _ = case.quantize()
    torch._dynamo.reset()  # what other cases compiled counts against a limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = case.trial.inputs()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(a), model(b)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@contract
def check_lora(case, tmp_path):
    """Adapters train on the frozen base, are saved and loaded, merged and taken away."""
    model, _ = case.quantize()
    x = case.trial.inputs()
    plain, before = run(model, x), {name: value.clone() for name, value in model.state_dict().items()}
    named = list(case.layers(model))
    assert octavo.add_lora(model, rank=4, dropout=0.0, exclude=()) == named
    assert torch.equal(run(model, x), plain)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) != ("lora_" in name), name
    trained = run(model, x)
    assert not torch.equal(trained, plain)
    octavo.save_adapter(model, tmp_path / "adapter")
    described = base_quantization(model, "default")
    found = registry.method_of_description(described)
    assert found is not None or case.trial.calibration is not None  # data are in no description
    if found is not None:
        method, settings = found
        assert method.layer is case.method.layer and method.stored == case.method.stored
        assert {n: v for n, v in case.all_settings.items() if n in settings} == {
            n: v for n, v in settings.items() if n in case.all_settings
        }
    fresh, _ = case.quantize()
    octavo.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(run(fresh, x), trained)
    report = octavo.merge_adapter(model, requantize=False)
    assert {layer.method for layer in report.layers} == {None} and report.error < 1e-6
    assert relative(run(model, x), trained) <= case.trial.bound
    octavo.unmerge_adapter(model)
    assert torch.equal(run(model, x), trained)
    try:
        octavo.merge_adapter(model, requantize=True)
    except ValueError as error:
        refused = str(error)
    else:
        refused = "requantize=False"
        octavo.unmerge_adapter(model)
    assert "requantize=False" in refused  # else it says what to do
    octavo.remove_lora(model)
    assert_same_bits(model.state_dict(), before)


@contract
def check_peft(case, tmp_path):
    """PEFT's own LoRA trains on the layers, saves, loads and merges."""
    peft = pytest.importorskip("peft")
    from octavo.integrations.peft import OctavoLoraLinear, register

    model, _ = case.quantize()
    x = case.trial.inputs()
    plain = run(model, x)
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, register(config, model))
    layers = [m for m in wrapped.modules() if isinstance(m, OctavoLoraLinear)]
    assert len(layers) == len(linears(case.model()))
    assert torch.equal(run(wrapped, x), plain)
    start = {name: value.clone() for name, value in wrapped.state_dict().items()}
    train(wrapped, x)
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, start[name]) != ("lora_" in name), name
    trained = run(wrapped, x)
    wrapped.save_pretrained(tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    base, _ = case.quantize()
    fresh = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=register(config, base))
    assert torch.equal(run(fresh, x), trained)
    with wrapped.disable_adapter():
        assert torch.equal(run(wrapped, x), plain)
    wrapped.merge_adapter()
    assert relative(run(wrapped, x), trained) <= case.trial.bound
    wrapped.unmerge_adapter()
    assert torch.equal(run(wrapped, x), trained)


@contract
def check_transformers(case, tmp_path):
    """A transformers model is saved by save_pretrained and comes back by from_pretrained, quantized on the way there
    where the method can, and to what quantize_model makes of it."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import tiny_llama
    from octavo.integrations.transformers import mark_quantized

    calibration = None
    if case.trial.calibration:
        generator = torch.Generator().manual_seed(5)
        calibration = [torch.randint(0, 128, (4, 64), generator=generator)]
    model, _ = case.quantize(tiny_llama.make(), calibration=calibration)
    layout = case.method.layout(case.method.settings(case.all_settings))
    config = octavo.OctavoConfig(case.name, **layout)
    with pytest.raises(ValueError, match=f"{case.method.name} has no setting no_such_setting; it has "):
        octavo.OctavoConfig(case.name, no_such_setting=1)
    tiny_llama.make().save_pretrained(tmp_path / "float")
    if case.method.in_stream:
        streamed = tiny_llama.Auto.from_pretrained(tmp_path / "float", quantization_config=config)
        assert_same_bits(streamed.state_dict(), model.state_dict())
        assert case.layers(streamed).keys() == case.layers(model).keys()
        streamed.save_pretrained(tmp_path / "streamed")
    else:
        with pytest.raises(ValueError, match="cannot quantize a model while it is loaded"):
            tiny_llama.Auto.from_pretrained(tmp_path / "float", quantization_config=config)
    mark_quantized(model, config)
    model.save_pretrained(tmp_path / "marked")
    for path in sorted({tmp_path / "streamed", tmp_path / "marked"}):
        if not path.exists():
            assert not case.method.in_stream
            continue
        saved = json.loads((path / "config.json").read_text())["quantization_config"]
        assert (saved["quant_method"], saved["method"]) == ("octavo", case.method.stored)
        assert layout.items() <= saved.items()
        loaded = tiny_llama.Auto.from_pretrained(path)
        assert_same_bits(loaded.state_dict(), model.state_dict())
        assert torch.equal(tiny_llama.logits(loaded), tiny_llama.logits(model))


@pytest.mark.parametrize("name", registry.method_names())
@pytest.mark.parametrize("check", CONTRACT)
def test_contract(name, check, tmp_path):
    CONTRACT[check](Case(name), tmp_path)


# ---- a method of another package -------------------------------------------------------------------------------------


@pytest.fixture
def empty_place():
    """The registry as it was before the test, afterwards."""
    before = dict(registry.methods())
    yield
    registry._methods.clear()
    registry._methods.update(before)


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("name", ["ternary", "ternary-dense"])
@pytest.mark.usefixtures("empty_place")
def test_a_registered_method_fulfils_the_contract(name, check, tmp_path):
    with pytest.raises(ValueError, match=f"unknown method '{name}'"):
        octavo.quantize_model(nn.Sequential(nn.Linear(2, 2)), name)
    register("ternary")(make_ternary())
    CONTRACT[check](Case(name), tmp_path)


@pytest.mark.usefixtures("empty_place")
@pytest.mark.parametrize("name", ["nf4", "fp4", "none", "ternary"])
def test_a_name_is_registered_once(name):
    if name == "ternary":
        register("ternary")(make_ternary())
    with pytest.raises(ValueError, match=f"there is a method '{name}' already"):
        register(name)(make_ternary())


@pytest.mark.usefixtures("empty_place")
def test_a_layer_without_weight_cannot_be_filled_while_a_checkpoint_is_read():
    class Renamed(TernaryLinear):
        tensors = ("codes", "scale")

    made = make_ternary()
    made.layer = Renamed
    with pytest.raises(ValueError, match="one tensor of its layer must be called weight, not codes, scale"):
        register("renamed")(made)
    assert "renamed" not in registry.methods()


@pytest.mark.usefixtures("empty_place")
def test_entry_points_are_loaded_and_a_broken_one_warns(monkeypatch):
    asked = []

    def broken():
        raise ImportError("no module named its_dependency")

    def entry_points(group):
        asked.append(group)
        return [
            SimpleNamespace(name="broken", value="broken.package:Method", load=broken),
            SimpleNamespace(name="ternary", value="ternary", load=lambda: register("ternary")(make_ternary())),
        ]

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_pending", True)
    with pytest.warns(UserWarning, match=r"broken \(broken.package:Method\) cannot be loaded.*its_dependency"):
        names = registry.method_names()
    assert asked == ["octavo.methods"]
    assert {"ternary", "ternary-dense", "int8", "nf4"} <= {*names}
    model = nn.Sequential(nn.Linear(8, 8))
    octavo.quantize_model(model, "ternary", progress=False)
    assert type(model[0]) is TernaryLinear
    registry.methods()
    assert asked == ["octavo.methods"]


def test_the_trials_are_of_this_package():
    """A method without its own room would not be covered by the rules of rooms."""
    package = Path(octavo.__file__).parent
    for name, method in registry.methods().items():
        if type(method).__module__.startswith("octavo."):
            room = type(method).__module__.split(".")[1]
            assert (package / room / "method.py").is_file(), name
