"""NF4 as a quantizer of transformers: quantize while loading, save, load, offload, damaged files."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from octavo import quantize_4bit, quantize_model, reference  # noqa: E402
from octavo.integrations.transformers import OctavoConfig, mark_quantized  # noqa: E402
from octavo.models import find_source, load_model, quantize_to_directory  # noqa: E402
from octavo.nf4 import method as nf4_method  # noqa: E402
from octavo.nn import Int8Linear, NF4Linear, SpQRLinear  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_llama import MAP, Auto, logits, make  # noqa: E402

OPTIONS = {
    "default": {},
    "fp4": {"quant_type": "fp4", "blocksize": 32},
    "double": {"double_quant": True},
    "nf3": {"quant_type": "nf3", "blocksize": 256, "double_quant": True},
}
NAME = "model.layers.0.mlp.gate_proj"


@pytest.fixture
def source(tmp_path):
    make().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def saved(source, tmp_path):
    config = OctavoConfig("nf4", double_quant=True)
    Auto.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def assert_same_model(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype is right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    assert torch.equal(logits(a), logits(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", OPTIONS)
def test_quantizes_while_loading(tmp_path, case, dtype):
    original = make(dtype)
    original.save_pretrained(tmp_path / "source")
    model = Auto.from_pretrained(tmp_path / "source", quantization_config=OctavoConfig("nf4", **OPTIONS[case]))
    assert len(layers(model)) == 14
    for name, layer in layers(model).items():
        linear = original.get_submodule(name)
        expected = quantize_4bit(linear.weight.detach(), **OPTIONS[case])
        for mine, tensor in zip(layer.packed_weight.tensors(), expected.tensors(), strict=True):
            assert (mine is None) == (tensor is None)
            assert mine is None or torch.equal(mine, tensor)
        assert layer.weight_dtype is dtype
        assert {n for n, p in layer.named_parameters() if p.requires_grad} <= {"bias"}
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = Auto.from_pretrained(tmp_path / "source")
    quantize_model(plain, method="nf4", progress=False, **OPTIONS[case])
    assert_same_model(model, plain)
    assert model.dtype is dtype
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable


@pytest.mark.parametrize("case", OPTIONS)
def test_saved_directory_loads_by_itself(source, tmp_path, case):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig("nf4", **OPTIONS[case]))
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = Auto.from_pretrained(tmp_path / "saved")
    assert_same_model(again, model)
    assert repr(again) == repr(model)
    assert {n.rpartition(".")[2] for n, p in again.named_parameters() if not p.requires_grad} <= {
        *("weight", "absmax", "nested_absmax", "offset")
    }
    assert_same_model(load_model(find_source(tmp_path / "saved")), model)
    again.save_pretrained(tmp_path / "twice")
    assert_same_model(Auto.from_pretrained(tmp_path / "twice"), model)
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_the_scales(saved, dtype):
    model, half = Auto.from_pretrained(saved), Auto.from_pretrained(saved, dtype=dtype)
    moved = Auto.from_pretrained(saved).to(dtype)
    for name, layer in layers(model).items():
        for other in (half.get_submodule(name), moved.get_submodule(name)):
            for mine, tensor in zip(other.packed_weight.tensors(), layer.packed_weight.tensors(), strict=True):
                assert mine.dtype is tensor.dtype and torch.equal(mine, tensor)
            assert other.bias is None or other.bias.dtype is dtype
    assert logits(half).dtype is dtype
    assert half.dequantize().model.layers[0].mlp.up_proj.weight.dtype is dtype


def test_dequantize(saved, tmp_path):
    model = Auto.from_pretrained(saved)
    exact = logits(model)
    model.save_pretrained(tmp_path / "again")
    plain = model.dequantize()
    assert not layers(plain)
    torch.testing.assert_close(logits(plain), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("case", ["default", "nf3"])
@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_disk_offload(source, tmp_path, quantized_before, case, offload_buffers):
    config = OctavoConfig("nf4", **OPTIONS[case])
    model = Auto.from_pretrained(source, quantization_config=config)
    path, keywords = source, {"quantization_config": config}
    if quantized_before:
        path, keywords = tmp_path / "saved", {}
        model.save_pretrained(path)
    keywords |= {"device_map": MAP, "offload_folder": tmp_path / "disk", "offload_buffers": offload_buffers}
    offloaded = Auto.from_pretrained(path, **keywords)
    layer = offloaded.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta
    assert all(buffer.is_meta == offload_buffers for buffer in layer.buffers())
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "again")
    assert_same_model(Auto.from_pretrained(tmp_path / "again"), model)


def test_automatic_map_counts_packed_bytes(saved, tmp_path):
    keywords = {"max_memory": {"cpu": "50KB"}, "offload_folder": tmp_path / "disk", "offload_buffers": True}
    spread = Auto.from_pretrained(saved, device_map="auto", **keywords)
    assert "disk" in spread.hf_device_map.values()
    assert torch.equal(logits(spread), logits(Auto.from_pretrained(saved)))


def test_only_one_tensor_at_a_time_is_unquantized(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    alive, most = weakref.WeakSet(), 0
    quantize = nf4_method.quantize_4bit

    def watched(weight, *options):
        nonlocal most
        alive.add(weight)
        most = max(most, len(alive))
        return quantize(weight, *options)

    monkeypatch.setattr(nf4_method, "quantize_4bit", watched)
    model = Auto.from_pretrained(tmp_path / "source", quantization_config=OctavoConfig("nf4"))
    assert len(layers(model)) == 14
    assert most == 1


def mixed_model():
    """Every kind of layer that an nf4 checkpoint may have, tensors that two layers share among them."""
    model = make()
    first, second = (block.mlp for block in model.model.layers)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if name == "v_proj":
                    parent.v_proj = Int8Linear.from_linear(linear, threshold=3.0)
                elif name in ("q_proj", "up_proj"):
                    setattr(parent, name, NF4Linear.from_linear(linear, double_quant=name == "q_proj"))
    second.up_proj = NF4Linear.from_weight(first.up_proj.packed_weight)
    return model


def test_mixed_checkpoints(tmp_path):
    model = mixed_model()
    mark_quantized(model, OctavoConfig("nf4", threshold=3.0))
    model.save_pretrained(tmp_path / "mixed")
    again = Auto.from_pretrained(tmp_path / "mixed")
    assert_same_model(again, mixed_model())
    assert [type(getattr(again.model.layers[0].self_attn, name)) for name in ("q_proj", "k_proj", "v_proj")] == [
        *(NF4Linear, torch.nn.Linear, Int8Linear)
    ]
    kinds = {name.rpartition(".")[2]: layer.double_quant for name, layer in layers(again).items()}
    assert kinds == {"q_proj": True, "up_proj": False}


def test_mark_quantized_checks_the_options():
    model = mixed_model()
    for config in (OctavoConfig(), OctavoConfig("nf4", quant_type="fp4"), OctavoConfig("nf4", blocksize=128)):
        with pytest.raises(
            ValueError, match=r"q_proj needs OctavoConfig\(method='nf4', quant_type='nf4', blocksize=64"
        ):
            mark_quantized(model, config)
    assert not hasattr(model, "hf_quantizer")
    model.model.layers[0].self_attn.o_proj = SpQRLinear(64, 64)
    with pytest.raises(ValueError, match=r"o_proj needs OctavoConfig\(method='spqr', bits=3"):
        mark_quantized(model, OctavoConfig("nf4"))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nf4", "quant_type": "int4"}, "quant_type must be one of .*, got 'int4'"),
        ({"method": "nf4", "blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
        ({"method": "nf4", "double_quant": "yes"}, "double_quant must be True or False, got 'yes'"),
        ({"method": "nf4", "bits": 4}, "nf4 has no setting bits; it has quant_type, blocksize, double_quant"),
        (
            {"quant_type": "nf4", "double_quant": False},
            "int8 has no setting quant_type, double_quant; it has",
        ),
        ({"method": "spqr", "blocksize": 64}, "spqr has no setting blocksize; it has bits, group_size"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        OctavoConfig(**arguments)


def test_config_round_trip():
    config = OctavoConfig("nf4", blocksize=128, double_quant=True)
    again = OctavoConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.layout() == config.layout() == {"quant_type": "nf4", "blocksize": 128, "double_quant": True}
    assert "quant_type" not in OctavoConfig().to_dict()  # an octavo of before nf4 reads it


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_weights_that_are_not_finite(source, tmp_path, place, double_quant):
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][95, 63] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    keywords = {"device_map": MAP, "offload_folder": tmp_path / "disk"} if place == "disk" else {}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* NaN or Inf"):
        Auto.from_pretrained(source, quantization_config=OctavoConfig("nf4", double_quant=double_quant), **keywords)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.absmax"), f"the checkpoint has no {NAME}.absmax"),
        (lambda t: t.pop(f"{NAME}.offset"), f"the checkpoint has no {NAME}.offset"),
        (lambda t: t.pop(f"{NAME}.nested_absmax"), f"the checkpoint has no {NAME}.nested_absmax"),
        (lambda t: t.pop(f"{NAME}.weight"), f"the checkpoint has no {NAME}.weight"),
        (
            lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:-1]}),
            r"weight must be uint8 \[3072\], got .*3071",
        ),
        (
            lambda t: t.update({f"{NAME}.weight": torch.zeros(96, 64)}),
            r"weight must be uint8 \[3072\], got float32 \[96",
        ),
        (lambda t: t.update({f"{NAME}.absmax": torch.ones(96)}), r"absmax must be uint8 \[96\], got float32 \[96\]"),
        (lambda t: t[f"{NAME}.offset"].fill_(torch.nan), f"{NAME}: offset has 1 non-finite values of 1"),
    ],
)
def test_damaged_tensors(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Auto.from_pretrained(saved)


def test_a_changed_configuration_does_not_fit_the_tensors(saved):
    described = json.loads((saved / "config.json").read_text())
    for key, value, message in (
        ("blocksize", 128, r"absmax must be uint8 \[32\], got uint8 \[64\]"),
        ("quant_type", "nf3", r"weight must be uint8 \[1536\], got uint8 \[2048\]"),
        ("quant_type", 4, "quant_type must be one of .*, got 4"),
    ):
        changed = described["quantization_config"] | {key: value}
        (saved / "config.json").write_text(json.dumps(described | {"quantization_config": changed}))
        with pytest.raises(ValueError, match=message):
            Auto.from_pretrained(saved)


# ---- directories -----------------------------------------------------------------------------------------------------


def test_quantize_to_directory(source, tmp_path):
    done = quantize_to_directory(find_source(source), tmp_path / "nf4", "nf4", quant_type="fp4", double_quant=True)
    assert done["layers"] == 14
    assert 4.12 < done["real_bits"] < 4.2
    assert done["description"] == "fp4 codes in blocks of 64, double quantization"
    model = load_model(find_source(tmp_path / "nf4"))
    assert {(layer.quant_type, layer.double_quant) for layer in layers(model).values()} == {("fp4", True)}
    for keywords, message in (
        ({"threshold": 6.0}, "nf4 has no setting threshold"),
        ({"bits": 4}, "nf4 has no setting bits"),
        ({"calibration": "text.txt"}, "nf4 takes no calibration"),
        ({"method": "int8", "blocksize": 64}, "int8 has no setting blocksize"),
        ({"method": "rtn", "quant_type": "nf4"}, "rtn has no setting quant_type"),
        ({"blocksize": 48}, "blocksize must be a power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_to_directory(find_source(source), tmp_path / "no", **{"method": "nf4", **keywords})
    assert not (tmp_path / "no").exists()


def test_layers_are_as_the_reference_dequantizes_them(saved):
    layer = Auto.from_pretrained(saved).get_submodule(NAME)
    weight = reference.nf4_dequantize(*layer.packed_weight.tensors(), (96, 64), torch.float32)
    assert torch.equal(layer.dequantize().weight, weight)
