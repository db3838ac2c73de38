"""octavo as a quantizer of transformers: quantize while loading, save, load, shards, offloading, damaged files."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from octavo import load_quantized, quantize_model, reference, save_quantized  # noqa: E402
from octavo.integrations.transformers import OctavoConfig, mark_quantized  # noqa: E402
from octavo.models import find_source, load_model, quantize_to_directory  # noqa: E402
from octavo.nn import Int8Linear, SpQRLinear  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from spqr_weights import random_weight  # noqa: E402
from tiny_llama import MAP, Auto, logits, make  # noqa: E402


@pytest.fixture
def source(tmp_path):
    make().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizes_while_loading(tmp_path, dtype):
    original = make(dtype)
    original.save_pretrained(tmp_path / "source")
    model = Auto.from_pretrained(tmp_path / "source", quantization_config=OctavoConfig(threshold=3.0))
    found = layers(model)
    assert len(found) == 14
    for name, layer in found.items():
        linear = original.get_submodule(name)
        codes, scale = reference.quantize_rowwise(linear.weight.detach())
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.weight_scale, scale)
        assert layer.threshold == 3.0
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = Auto.from_pretrained(tmp_path / "source")
    quantize_model(plain, threshold=3.0, progress=False)
    assert torch.equal(logits(model), logits(plain))
    assert model.dtype is dtype


def test_saved_directory_loads_by_itself(source, tmp_path):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig(threshold=2.5))
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    assert stored[f"{name}.weight"].dtype is torch.int8
    assert stored[f"{name}.weight_scale"].dtype is torch.float32
    assert f"{name}.bias" in stored
    again = Auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert {layer.threshold for layer in layers(again).values()} == {2.5}
    again.save_pretrained(tmp_path / "twice")
    assert {k: v.tolist() for k, v in load_file(tmp_path / "twice" / "model.safetensors").items()} == {
        k: v.tolist() for k, v in stored.items()
    }


def test_tensors_say_which_layers_of_a_checkpoint_are_quantized(saved):
    """A skip that was written when patterns meant less, "mlp" no more than a layer of that name, leaves nothing out."""
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["skip"] = ["lm_head", "mlp", "layers"]
    (saved / "config.json").write_text(json.dumps(config))
    assert len(layers(Auto.from_pretrained(saved))) == 14


def test_shards_in_and_out(tmp_path):
    make().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    model = Auto.from_pretrained(tmp_path / "source", quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "saved")), logits(model))


def test_other_dtype_keeps_the_scales(source, tmp_path):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path / "saved")
    half = Auto.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    layer = half.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.weight_scale, model.model.layers[0].self_attn.q_proj.weight_scale)
    assert layer.bias.dtype is torch.bfloat16
    assert logits(half).dtype is torch.bfloat16


def test_base_model_reads_the_checkpoint_of_a_head(source, tmp_path):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path / "saved")
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_skip_and_tied_heads(tmp_path):
    make(tied=False).save_pretrained(tmp_path / "untied")
    make(tied=True).save_pretrained(tmp_path / "tied")
    names = set(layers(Auto.from_pretrained(tmp_path / "untied", quantization_config=OctavoConfig(skip=()))))
    assert "lm_head" in names
    config = OctavoConfig(skip=("down_proj", "model.layers.0.self_attn.q_proj"))
    tied = set(layers(Auto.from_pretrained(tmp_path / "tied", quantization_config=config)))
    assert "lm_head" not in tied  # it is the embedding
    assert tied == {n for n in names if "down_proj" not in n} - {"lm_head", "model.layers.0.self_attn.q_proj"}


def test_quantize_model_and_kept_columns_save_as_transformers_does(tmp_path):
    model = make()
    batches = [torch.arange(20)[None]]
    quantize_model(model, threshold=1.5, progress=False, calibration=batches, keep_outliers=True)
    kept = {name: layer.kept_columns for name, layer in layers(model).items()}
    assert sum(kept.values()) > 0
    mark_quantized(model, OctavoConfig(threshold=1.5))
    model.save_pretrained(tmp_path / "saved")
    again = Auto.from_pretrained(tmp_path / "saved")
    assert {name: layer.kept_columns for name, layer in layers(again).items()} == kept
    assert torch.equal(logits(again), logits(model))


def test_dequantize(source):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig())
    exact = logits(model)
    plain = model.dequantize()
    assert not layers(plain)
    assert torch.allclose(logits(plain), exact, atol=0.02)


# ---- device_map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_disk_offload(source, tmp_path, offload_buffers, quantized_before):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig())
    path, keywords = source, {"quantization_config": OctavoConfig()}
    if quantized_before:
        path, keywords = tmp_path / "saved", {}
        model.save_pretrained(path)
    offloaded = Auto.from_pretrained(
        path, device_map=MAP, offload_folder=tmp_path / "disk", offload_buffers=offload_buffers, **keywords
    )
    layer = offloaded.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta == offload_buffers
    assert not offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "again")), logits(model))


def test_automatic_map_counts_int8_bytes(source, tmp_path):
    model = Auto.from_pretrained(source, quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path / "saved")
    spread = Auto.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": "100KB"},
        offload_folder=tmp_path / "disk",
        offload_buffers=True,
    )
    assert "disk" in spread.hf_device_map.values()
    assert torch.equal(logits(spread), logits(model))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "int3"}, "unknown method 'int3' .*; known: int8"),
        ({"threshold": -1.0}, "got -1.0"),
        ({"threshold": float("nan")}, "got nan"),
        ({"format_version": 9}, "format_version 9: this octavo reads 1"),
        ({"treshold": 6.0}, "int8 has no setting treshold; it has threshold"),
        ({"method": "spqr", "bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"bits": 4, "zero_bits": 2}, "int8 has no setting bits, zero_bits; it has threshold"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        OctavoConfig(**arguments)


def test_config_round_trip():
    config = OctavoConfig(threshold=4.0, skip="lm_head")
    assert OctavoConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert config.skip == ["lm_head"]
    assert "bits" not in config.to_dict()  # an octavo of before SpQR reads it
    spqr = OctavoConfig("spqr", bits=4, stats_group_size=32)
    again = OctavoConfig.from_dict(json.loads(spqr.to_json_string()))
    assert again.to_dict() == spqr.to_dict()
    assert tuple(again.layout().values()) == tuple(spqr.layout().values()) == (4, 16, 32, 3, 3)


def test_nothing_to_quantize(source):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no torch\.nn\.Linear to quantize"):
        Auto.from_pretrained(source, quantization_config=OctavoConfig(skip=names))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_weights_that_are_not_finite(source, tmp_path, place):
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    keywords = {"device_map": MAP, "offload_folder": tmp_path / "disk", "offload_buffers": True}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* NaN or Inf"):
        Auto.from_pretrained(source, quantization_config=OctavoConfig(), **(keywords if place == "disk" else {}))


@pytest.fixture
def saved(source, tmp_path):
    Auto.from_pretrained(source, quantization_config=OctavoConfig()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


NAME = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{NAME}.weight_scale"].__setitem__(2, torch.nan), "weight_scale has 1 non-finite values of 96"),
        (lambda t: t.pop(f"{NAME}.weight_scale"), f"the checkpoint has no {NAME}.weight_scale"),
        (lambda t: t.pop(f"{NAME}.weight"), f"the checkpoint has no {NAME}.weight"),
        (
            lambda t: t.update({f"{NAME}.weight": torch.zeros(96, 64)}),
            "gate_proj.weight is float32, which codes of int8 are not",
        ),
        (lambda t: t.update({f"{NAME}.weight_scale": torch.zeros(7)}), r"weight_scale must be float32 \[96\], got"),
    ],
)
def test_damaged_tensors(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Auto.from_pretrained(saved)


def test_truncated_file(saved):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        Auto.from_pretrained(saved)


def test_unknown_format_version(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 2: this octavo reads 1"):
        Auto.from_pretrained(saved)


def test_only_one_tensor_at_a_time_is_unquantized(tmp_path, monkeypatch):
    """What is quantized is freed before the next: no two unquantized weights are alive together."""
    import weakref

    from octavo import int8

    make().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    alive, most = weakref.WeakSet(), 0
    quantize = int8.ops.quantize_rowwise

    def watched(weight):
        nonlocal most
        alive.add(weight)
        most = max(most, len(alive))
        return quantize(weight)

    monkeypatch.setattr(int8.ops, "quantize_rowwise", watched)
    model = Auto.from_pretrained(tmp_path / "source", quantization_config=OctavoConfig())
    assert len(layers(model)) == 14
    assert most == 1


def test_saved_names_are_the_documented_ones(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        leaves = {key.removeprefix(f"{NAME}.") for key in file.keys() if key.startswith(NAME)}  # noqa: SIM118
    assert leaves == {"weight", "weight_scale"}


# ---- SpQR ----------------------------------------------------------------------------------------------------------

SPQR = {"bits": 4, "group_size": 32, "stats_group_size": 48, "scale_bits": 2, "zero_bits": 4}
KINDS = {"q_proj": {}, "k_proj": {"perm": False}, "up_proj": {"bilevel": False}, "down_proj": {"outliers": 0.0}}


def spqr_model(dtype=torch.float32):
    """Every form of layer, int8 and unquantized ones too."""
    model = make(dtype)
    for index, block in enumerate(model.model.layers):
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if name in KINDS:
                    sizes = (linear.out_features, linear.in_features)
                    weight = random_weight(*sizes, **{**SPQR, "unit": 2.0**-15, "seed": index, **KINDS[name]})
                    setattr(parent, name, SpQRLinear.from_weight(weight, linear.bias).eval())
                elif name == "v_proj":
                    parent.v_proj = Int8Linear.from_linear(linear, threshold=3.0)
    return model


def spqr_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SpQRLinear)}


@pytest.fixture
def spqr_saved(tmp_path):
    model = spqr_model()
    mark_quantized(model, OctavoConfig("spqr", threshold=3.0, **SPQR))
    model.save_pretrained(tmp_path / "spqr")
    return tmp_path / "spqr"


def test_spqr_saves_and_loads(spqr_saved, tmp_path):
    model, again = spqr_model(), Auto.from_pretrained(spqr_saved)
    assert len(spqr_layers(again)) == 8
    assert set(layers(again)) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert type(again.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    for name in old:
        assert old[name].dtype is new[name].dtype
        assert torch.equal(old[name], new[name]), name
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 2
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "twice")), logits(model))
    base = transformers.AutoModel.from_pretrained(spqr_saved)
    assert len(spqr_layers(base)) == 8
    assert torch.equal(logits(load_model(find_source(spqr_saved))), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spqr_in_another_dtype_keeps_its_statistics(spqr_saved, dtype):
    half = Auto.from_pretrained(spqr_saved, dtype=dtype)
    layer, original = half.model.layers[0].self_attn.q_proj, spqr_model().model.layers[0].self_attn.q_proj
    assert layer.second_order.dtype is torch.float16
    for name, buffer in original.named_buffers():
        assert torch.equal(getattr(layer, name), buffer), name
    assert layer.bias.dtype is dtype
    assert logits(half).dtype is dtype


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_spqr_disk_offload(spqr_saved, tmp_path, offload_buffers):
    keywords = {"device_map": MAP, "offload_folder": tmp_path / "disk", "offload_buffers": offload_buffers}
    offloaded = Auto.from_pretrained(spqr_saved, **keywords)
    assert offloaded.model.layers[1].mlp.up_proj.codes.is_meta == offload_buffers
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(spqr_model()))


def test_layers_that_share_a_tensor_are_saved_apart(tmp_path):
    """Layers with one input are quantized in one order, and may hold one permutation."""
    model = spqr_model()
    attention = [block.self_attn for block in model.model.layers]
    for layer in attention:
        layer.k_proj.perm = layer.q_proj.perm
        layer.k_proj.unit = layer.q_proj.unit
    expected = logits(model)
    mark_quantized(model, OctavoConfig("spqr", threshold=3.0, **SPQR))
    model.save_pretrained(tmp_path / "shared")
    again = Auto.from_pretrained(tmp_path / "shared")
    assert torch.equal(logits(again), expected)
    assert torch.equal(again.model.layers[0].self_attn.k_proj.perm, attention[0].q_proj.perm)


def test_dequantize_after_saving(spqr_saved, tmp_path):
    model = Auto.from_pretrained(spqr_saved)
    model.save_pretrained(tmp_path / "again")  # leaves the dtype in the configuration as a string
    model.dequantize()
    assert not any(isinstance(module, SpQRLinear) for module in model.modules())


def test_spqr_dequantize(spqr_saved):
    model = Auto.from_pretrained(spqr_saved)
    exact = logits(model)
    plain = model.dequantize()
    assert not spqr_layers(plain)
    assert torch.allclose(logits(plain), exact, atol=0.02)


def test_spqr_octavo_directory_is_built_from_its_configuration(tmp_path):
    model = spqr_model()
    save_quantized(model, tmp_path / "saved")
    assert torch.equal(logits(load_quantized(tmp_path / "saved")), logits(model))


def test_spqr_is_not_made_while_loading(source):
    with pytest.raises(ValueError, match=r"spqr needs calibration data.*octavo\.quantize_model\(model, method='spqr'"):
        Auto.from_pretrained(source, quantization_config=OctavoConfig("spqr"))
    with pytest.raises(ValueError, match="method spqr needs calibration data"):
        quantize_to_directory(find_source(source), source.parent / "spqr", "spqr")
    assert not (source.parent / "spqr").exists()


def test_mark_quantized_checks_the_options():
    model = spqr_model()
    for config in (OctavoConfig(), OctavoConfig("spqr")):
        with pytest.raises(ValueError, match=r"q_proj needs OctavoConfig\(method='spqr', bits=4, group_size=32"):
            mark_quantized(model, config)
    assert not hasattr(model, "hf_quantizer")


NAN = torch.full((2, 2, 4), torch.nan).half()
SPQR_NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{SPQR_NAME}.unit"), f"{SPQR_NAME}: the checkpoint has no {SPQR_NAME}.unit"),
        (lambda t: t.pop(f"{SPQR_NAME}.codes"), f"the checkpoint has no {SPQR_NAME}.codes, but other"),
        (lambda t: t.pop(f"{SPQR_NAME}.bias"), f"the checkpoint has no {SPQR_NAME}.bias"),
        (lambda t: t.update({f"{SPQR_NAME}.second_order": NAN}), "q_proj: 16 of 16 scales and zero points are NaN"),
        (lambda t: t[f"{SPQR_NAME}.row_offsets"].__setitem__(3, -1), "q_proj: row_offsets decrease at row 2"),
        (lambda t: t.update({f"{SPQR_NAME}.codes": torch.zeros(4, 2, 3, 16).int()}), r"q_proj: codes must be int32 .*"),
    ],
)
def test_damaged_spqr_tensors(spqr_saved, change, message):
    tensors = load_file(spqr_saved / "model.safetensors")
    change(tensors)
    save_file(tensors, spqr_saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Auto.from_pretrained(spqr_saved)
