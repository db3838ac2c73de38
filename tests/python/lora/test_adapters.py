"""Adapters of whole models: adding, freezing, switching, files, merging."""

from __future__ import annotations

import json
import math
import os

import octavo
import pytest
import torch
from lora_layers import (
    BASES,
    IDS,
    NAMES,
    REQUANTIZED,
    Model,
    assert_unchanged,
    outputs,
    randomize,
    snapshot,
    with_adapter,
)
from octavo.lora.adapters import base_quantization
from octavo.nn import Int8Linear, LoRALinear
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


@pytest.fixture
def saved(tmp_path):
    """Two adapters, and what a model computes with them."""
    expected = {}
    for seed, name in ((1, "a"), (2, "b")):
        model = with_adapter("int8", seed=seed)
        octavo.save_adapter(model, tmp_path / name)
        expected[name] = outputs(model)
    return tmp_path, expected


# ---- adding and removing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_add_lora(kind):
    model = Model(kind)
    before = outputs(model)
    assert octavo.add_lora(model, 4, 8, 0.1) == NAMES
    assert torch.equal(outputs(model), before)
    layer = model.blocks[1].down
    assert isinstance(layer, LoRALinear) and type(model.lm_head) is nn.Linear
    assert layer.adapters == {"default": (4, 8, 0.1, False)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{letter}.default" for name in NAMES for letter in "AB"}
    (found,) = octavo.lora.list_adapters(model).items()
    assert found == ("default", octavo.lora.Adapter(NAMES, [4], 4 * (4 * (64 + 96)), True))
    randomize(model)
    assert not torch.allclose(outputs(model), before)


@pytest.mark.parametrize("kind", BASES)
def test_remove_lora(kind):
    model = Model(kind)
    before, bases = outputs(model), {name: model.get_submodule(name) for name in NAMES}
    octavo.add_lora(model, 4)
    randomize(model)
    assert octavo.remove_lora(model) == NAMES
    assert {name: model.get_submodule(name) for name in NAMES} == bases
    assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="Model has no adapters"):
        octavo.remove_lora(model)


def test_a_merged_model_keeps_its_adapters():
    model = Model("linear")
    octavo.add_lora(model, 4)
    randomize(model)
    octavo.merge_adapter(model)
    before = outputs(model)
    with pytest.raises(RuntimeError, match="merged"):
        octavo.remove_lora(model)
    assert torch.equal(outputs(model), before)
    octavo.unmerge_adapter(model)
    assert octavo.remove_lora(model) == NAMES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (None, "none"),
        ({"method": "int8"}, "int8"),
        ({"method": "nf4"}, "nf4"),
        ({"method": "nf4", "quant_type": "fp4", "double_quant": True}, "fp4 double_quant"),
        ({"method": "nf4", "blocksize": 128}, "nf4 blocksize=128"),
    ],
)
def test_what_an_adapter_says_of_its_base(options, said):
    model = Model("linear")
    if options is not None:
        octavo.quantize_model(model, progress=False, **options)
    octavo.add_lora(model, 4)
    assert base_quantization(model, "default") == said


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": ["up"]}, NAMES[::2]),
        ({"include": "blocks.1.down"}, NAMES[3:]),
        ({"include": ["lm_head"], "exclude": ()}, ["lm_head"]),
        ({"exclude": ["down", "blocks.0.up"]}, [NAMES[2], "lm_head"]),
    ],
    ids=str,
)
def test_include_and_exclude(options, names):
    model = Model()
    assert octavo.add_lora(model, 4, **options) == names
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALinear)} == set(names)


def test_shared_layers_stay_shared():
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    assert octavo.add_lora(model, 4) == [NAMES[0], NAMES[1], NAMES[3]]
    assert model.blocks[1].up is model.blocks[0].up
    assert isinstance(model.blocks[1].up, LoRALinear)
    octavo.remove_lora(model)
    assert model.blocks[1].up is model.blocks[0].up


def test_torch_encoder_layers_are_left_alone():
    """In inference they read the weights of linear1 and linear2 past their forward."""
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 32, batch_first=True), nn.Linear(64, 8))
    assert octavo.add_lora(model, 4) == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of 1 or more, got 0"),
        ({"alpha": math.nan}, "alpha must be a positive number, got nan"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\), got 1\.5"),
        ({"name": "a/b"}, "got 'a/b'"),
        ({"dtype": torch.int8}, r"dtype must be float32, float16 or bfloat16, got torch\.int8"),
        ({"include": ["up", "q_proj"]}, "include names no linear layer of Model: q_proj"),
        ({"exclude": ["k_proj"]}, "exclude names no linear layer of Model: k_proj"),
        ({"exclude": ["up", "down", "lm_head"]}, "no linear layer to adapt"),
    ],
    ids=str,
)
def test_add_lora_refuses(options, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        octavo.add_lora(model, **options)
    assert_unchanged(model, before)


def test_add_lora_refuses_names_and_models():
    model = with_adapter(include=["up"])
    before = snapshot(model)
    for include in (None, ["down"]):
        with pytest.raises(ValueError, match="an adapter 'default' already"):
            octavo.add_lora(model, include=include)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="the model is itself a Int8Linear"):
        octavo.add_lora(Int8Linear(4, 4))


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_several_adapters_on_one_base():
    model = with_adapter(name="a", include=["up"])
    bare, with_a = Model("int8"), outputs(model)
    assert octavo.add_lora(model, 2, name="b") == NAMES
    randomize(model, "b", seed=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{letter}.b" for name in NAMES for letter in "AB"
    }
    with_b = outputs(model)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for name, expected in (("a", with_a), ("b", with_b), (None, outputs(bare)), ("a", with_a)):
        octavo.set_adapter(model, name)
        assert torch.equal(outputs(model), expected)
        assert [n for n, adapter in octavo.lora.list_adapters(model).items() if adapter.active] == (
            [name] if name else []
        )
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places  # nothing was moved
    octavo.lora.delete_adapter(model, "b")
    assert torch.equal(outputs(model), with_a)
    assert type(model.blocks[0].down) is Int8Linear  # it has no adapter left
    for call in (octavo.set_adapter, octavo.lora.delete_adapter):
        with pytest.raises(ValueError, match="Model has no adapter 'b'; known: a"):
            call(model, "b")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_save_and_load(kind, tmp_path):
    model = with_adapter(kind, name="tuned", use_rslora=True)
    expected = outputs(model)
    octavo.save_adapter(model, tmp_path / "my.adapter", "tuned")
    assert sorted(os.listdir(tmp_path / "my.adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["my.adapter"]
    other = Model(kind)
    before = outputs(other)
    assert octavo.load_adapter(other, tmp_path / "my.adapter") == "my_adapter"
    assert torch.equal(outputs(other), expected)
    assert not any(p.requires_grad for name, p in other.named_parameters() if "lora_" in name)
    assert other.blocks[0].up.adapters == {"my_adapter": (4, 8, 0.05, True)}
    octavo.set_adapter(other, None)
    assert torch.equal(outputs(other), before)


def test_what_is_written(tmp_path):
    octavo.save_adapter(with_adapter(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    assert config["target_modules"] == ["down", "up"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}.lora_{letter}.weight" for name in NAMES for letter in "AB"}
    assert tensors["base_model.model.blocks.0.up.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.blocks.0.up.lora_B.weight"].shape == (96, 4)
    octavo.save_adapter(with_adapter(include=["blocks.1.up", "blocks.0.down"]), tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.0.down", "blocks.1.up"]


def test_hot_swapping(saved):
    folder, expected = saved
    model = Model()
    bare = outputs(model)
    base = model.blocks[0].up
    for name in "ab":
        octavo.load_adapter(model, folder / name)
    for name in "abba":
        octavo.set_adapter(model, name)
        assert torch.equal(outputs(model), expected[name])
    octavo.set_adapter(model, None)
    assert torch.equal(outputs(model), bare)
    assert model.blocks[0].up.base_layer is base


def test_adapters_fit_bases_of_other_kinds(saved):
    """Trained on one, they load on any: the base is not touched."""
    folder, _ = saved
    for kind in BASES:
        model = Model(kind)
        octavo.load_adapter(model, folder / "a")
        assert type(model.blocks[0].up.base_layer) is type(Model(kind).blocks[0].up)


def test_trainable(saved):
    folder, expected = saved
    model = Model()
    octavo.load_adapter(model, folder / "a", trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{letter}.a" for name in NAMES for letter in "AB"}
    model.train()(IDS).square().mean().backward()
    assert float(model.blocks[0].up.lora_A["a"].grad.norm()) > 0
    octavo.load_adapter(model, folder / "b", "b16", dtype=torch.bfloat16)
    assert model.blocks[0].up.lora_A["b16"].dtype is torch.bfloat16
    octavo.set_adapter(model, "a")
    assert torch.equal(outputs(model), expected["a"])


def test_ranks_of_single_layers(tmp_path):
    model = Model()
    model.blocks[0].up = LoRALinear(model.blocks[0].up, 2, 3.5)
    for name in NAMES[1:]:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, LoRALinear(model.get_submodule(name), 8, 16))
    randomize(model)
    octavo.save_adapter(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == {r"blocks\.0\.up": 2} and config["alpha_pattern"] == {r"blocks\.0\.up": 3.5}
    other = Model()
    octavo.load_adapter(other, tmp_path / "out")
    assert torch.equal(outputs(other), outputs(model))
    assert octavo.lora.list_adapters(other)["out"].ranks == [2, 8]


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    model = with_adapter()
    octavo.save_adapter(model, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists and holds 2 entries"):
        octavo.save_adapter(model, tmp_path / "out")
    randomize(model, seed=5)
    octavo.save_adapter(model, tmp_path / "out", overwrite=True)
    after = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert after != before

    def fail(*arguments, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr("octavo.lora.peft_format.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        octavo.save_adapter(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == after
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "optimizer.pt").write_text("")
    with pytest.raises(FileExistsError, match=r"holds more than an adapter: optimizer\.pt"):
        octavo.save_adapter(model, tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="Model has no adapter 'x'; known: default"):
        octavo.save_adapter(model, tmp_path / "new", "x")
    model.blocks[0].up.lora_A["default"].data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"blocks\.0\.up: lora_A has 1 values of 256 that are NaN or Inf"):
        octavo.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_compiled_models(saved, tmp_path):
    folder, expected = saved
    compiled = torch.compile(Model(), backend="eager")
    octavo.load_adapter(compiled, folder / "a")
    octavo.load_adapter(compiled, folder / "b")
    torch.testing.assert_close(outputs(compiled), expected["b"])
    octavo.set_adapter(compiled, "a")
    torch.testing.assert_close(outputs(compiled), expected["a"])
    octavo.save_adapter(compiled, tmp_path / "again", "a")
    written, read = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "again", folder / "a"))
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)


def test_whole_models_are_saved_without_adapters(tmp_path):
    model = with_adapter()
    with pytest.raises(ValueError, match=r"blocks\.0\.up has LoRA adapters: octavo\.save_adapter saves them"):
        octavo.save_quantized(model, tmp_path / "whole")
    octavo.merge_adapter(model, requantize=True, keep=False)
    expected = outputs(model)
    octavo.save_quantized(model, tmp_path / "whole")
    assert torch.equal(outputs(octavo.load_quantized(tmp_path / "whole", Model("linear"))), expected)


def test_metadata_names_the_model(saved):
    with safe_open(saved[0] / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "octavo_base_class": "Model",
            "octavo_base_quantization": "int8",
        }


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_merge_and_unmerge(kind):
    model = with_adapter(kind)
    before, y = snapshot(model), outputs(model)
    report = octavo.merge_adapter(model)
    assert [layer.name for layer in report.layers] == NAMES and report.adapter == "default"
    assert all(type(model.get_submodule(name).merged_layer) is nn.Linear for name in NAMES)
    assert report.error == 0.0  # the model is in fp32
    torch.testing.assert_close(outputs(model), y, rtol=0.02, atol=0.2 if kind == "int8" else 1e-3)
    for call in (
        lambda: octavo.set_adapter(model, None),
        lambda: octavo.lora.delete_adapter(model, "default"),
        lambda: octavo.add_lora(model, name="b"),
        lambda: octavo.merge_adapter(model),
    ):
        with pytest.raises(RuntimeError, match=r"adapter 'default' is merged; call unmerge\(\) first"):
            call()
    octavo.unmerge_adapter(model)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), y)
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        octavo.unmerge_adapter(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_layers_are_in_the_dtype_of_the_model(dtype):
    model = with_adapter().to(dtype)
    y = outputs(model)
    report = octavo.merge_adapter(model)
    assert all(model.get_submodule(name).merged_layer.weight.dtype is dtype for name in NAMES)
    assert 1e-5 < report.error < torch.finfo(dtype).eps
    assert float((outputs(model) - y).norm()) < 0.05 * float(y.norm())


@pytest.mark.parametrize("kind", REQUANTIZED)
def test_merge_requantized(kind):
    model = with_adapter(kind)
    y = outputs(model)
    report = octavo.merge_adapter(model, requantize=True)
    assert {layer.method for layer in report.layers} == {kind}
    assert 1e-4 < report.error == max(layer.error for layer in report.layers) < 0.2
    assert report.delta_error > report.error
    assert "merged into 4 layers" in str(report) and kind in str(report)
    assert not torch.equal(outputs(model), y)
    octavo.unmerge_adapter(model)
    assert torch.equal(outputs(model), y)


def test_merge_for_good():
    model = with_adapter(include=["up"])
    octavo.add_lora(model, 4, name="b")
    octavo.set_adapter(model, "default")
    octavo.merge_adapter(model)
    merged = outputs(model)
    octavo.unmerge_adapter(model)
    octavo.merge_adapter(model, keep=False)
    assert torch.equal(outputs(model), merged)
    assert type(model.blocks[0].up) is nn.Linear and type(model.blocks[0].down) is Int8Linear
    assert octavo.lora.list_adapters(model) == {}


def test_merges_that_cannot_be():
    model = with_adapter("int8")
    model.blocks[1].down.lora_B["default"].data[5] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.down: adapter 'default': 96 of 6144 merged weights are NaN"):
        octavo.merge_adapter(model)
    assert not any(model.get_submodule(name).is_merged for name in NAMES)
    assert_unchanged(model, before)
    octavo.set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter is active; known: default"):
        octavo.merge_adapter(model)
    mixed = Model("int8")
    mixed.blocks[1] = Model("spqr").blocks[1]
    octavo.add_lora(mixed, 4)
    with pytest.raises(ValueError, match=r"blocks\.1\.up: SpQRLinear cannot be quantized again"):
        octavo.merge_adapter(mixed, requantize=True)
    assert not any(mixed.get_submodule(name).is_merged for name in NAMES)
    with pytest.raises(ValueError, match="Model has no adapters"):
        octavo.merge_adapter(Model())
