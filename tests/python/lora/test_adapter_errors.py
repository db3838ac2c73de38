"""Adapters that cannot be loaded: one clear error, and nothing is changed."""

from __future__ import annotations

import json
import math

import octavo
import pytest
import torch
from lora_layers import Model, assert_unchanged, snapshot, with_adapter
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(tmp_path):
    """Two adapters of a Model, under `a` and `b`."""
    for seed, name in ((1, "a"), (2, "b")):
        octavo.save_adapter(with_adapter(seed=seed), tmp_path / name)
    return tmp_path


BAD_CONFIGS = {
    "kind": ({"peft_type": "IA3"}, "peft_type 'IA3'; octavo reads 'LORA'"),
    "dora": ({"use_dora": True}, "use_dora = True, which octavo does not compute"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\], which octavo does not"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias = True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    "unknown": ({"use_new_thing": {"a": 1}}, r"use_new_thing = \{'a': 1\}"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which also changes the base's weights"),
    "rank": ({"r": 8}, r"down: lora_A is \[4, 96\] and lora_B is \[64, 4\], but adapter_config\.json says rank 8"),
    "rank 0": ({"r": 0}, "rank must be an integer of 1 or more, got 0"),
    "rank text": ({"r": "4"}, "has r = '4'"),
    "alpha": ({"lora_alpha": math.nan}, "alpha must be a positive number, got nan"),
    "alpha lacks": ({"lora_alpha": None}, "has lora_alpha = None"),
    "dropout": ({"lora_dropout": 2.0}, r"dropout must lie in \[0, 1\), got 2\.0"),
    "pattern": ({"rank_pattern": {"(": 2}}, "unterminated subpattern"),
    "pattern rank": ({"rank_pattern": {"up": "x"}}, r"has rank_pattern\['up'\] = 'x'"),
    "pattern rank 0": ({"rank_pattern": {"up": 0}}, "up: rank must be an integer of 1 or more, got 0"),
    "pattern alpha": ({"alpha_pattern": {"up": None}}, r"has alpha_pattern\['up'\] = None"),
    "rslora": ({"use_rslora": "false"}, "has use_rslora = 'false'"),
    "layers": ({"layers_to_transform": "0"}, "has layers_to_transform = '0'"),
    "layers text": ({"layers_to_transform": [0, "1"]}, r"has layers_to_transform = \[0, '1'\]"),
    "dropout text": ({"lora_dropout": "0.1"}, "has lora_dropout = '0.1'"),
    "targets 3": ({"target_modules": [3]}, r"has target_modules = \[3\]"),
    "fewer targets": (
        {"target_modules": ["up"]},
        r"holds tensors of blocks\.0\.down \(and 1 more\), which its target_modules \['up'\] do not name",
    ),
    "excluded": ({"exclude_modules": ["down"]}, r"target_modules .* without exclude_modules \['down'\] do not name"),
    "targets": ({"target_modules": 3}, "has target_modules = 3"),
    "more targets": ({"target_modules": ["up", "down", "lm_head"]}, "name lm_head, for which it has no tensors"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case, saved):
    folder = saved
    change, message = BAD_CONFIGS[case]
    where = folder / "a" / "adapter_config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | change))
    model = Model()
    octavo.load_adapter(model, folder / "b")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        octavo.load_adapter(model, folder / "a")
    assert_unchanged(model, before)


P = "base_model.model.blocks."
BAD_TENSORS = {
    "in_features": (
        {f"{P}1.down.lora_A.weight": torch.zeros(4, 97)},
        r"does not fit this Model: it adapts blocks\.1\.down as a weight of \[64, 97\], which is \[64, 96\] in the",
    ),
    "out_features": (
        {f"{P}0.up.lora_B.weight": torch.zeros(128, 4)},
        r"blocks\.0\.up as a weight of \[128, 64\], which is \[96, 64\] in the model",
    ),
    "no such layer": (
        {f"{P}7.up.lora_A.weight": torch.zeros(4, 64), f"{P}7.up.lora_B.weight": torch.zeros(96, 4)},
        r"it adapts blocks\.7\.up, which the model does not have",
    ),
    "no linear": (
        {f"{P}0.norm.lora_A.weight": torch.zeros(4, 64), f"{P}0.norm.lora_B.weight": torch.zeros(96, 4)},
        r"it adapts blocks\.0\.norm, which is a LayerNorm in the model",
    ),
    "half": ({f"{P}1.up.lora_B.weight": None}, r"blocks\.1\.up has lora_A and no lora_B"),
    "lacking": (
        {f"{P}1.up.lora_A.weight": None, f"{P}1.up.lora_B.weight": None},
        r"target_modules \['down', 'up'\] name blocks\.1\.up, for which it has no tensors",
    ),
    "nan": ({f"{P}0.up.lora_A.weight": torch.full((4, 64), math.nan)}, "has 256 values of 256 that are NaN or Inf"),
    "integers": ({f"{P}0.up.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, r"got int8 \[4, 64\]"),
    "vector": ({f"{P}0.up.lora_A.weight": torch.zeros(4)}, r"must be a matrix in a float dtype, got float32 \[4\]"),
    "rank": ({f"{P}0.up.lora_A.weight": torch.zeros(3, 64)}, r"lora_A is \[3, 64\] and lora_B is \[96, 4\]"),
    "embedding": (
        {"base_model.model.embedding.lora_embedding_A": torch.zeros(4, 20)},
        r"holds base_model\.model\.embedding\.lora_embedding_A \[4, 20\], which is no lora_A or lora_B of a linear",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, saved):
    folder = saved
    changes, message = BAD_TENSORS[case]
    where = folder / "a" / "adapter_model.safetensors"
    tensors = load_file(where)
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    save_file(tensors, where, metadata={"format": "pt"})
    for model in (Model(), with_adapter()):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            octavo.load_adapter(model, folder / "a")
        assert_unchanged(model, before)


def test_other_bases_are_refused(saved):
    folder = saved

    class Other(Model):
        pass

    other = Other()
    with pytest.raises(ValueError, match="is an adapter of a Model, the model is a Other"):
        octavo.load_adapter(other, folder / "a")
    deeper = Model(blocks=3)
    before = snapshot(deeper)
    with pytest.raises(ValueError, match=r"name blocks\.2\.up \(and 1 more\), for which it has no tensors"):
        octavo.load_adapter(deeper, folder / "a")
    assert_unchanged(deeper, before)
    with pytest.raises(ValueError, match=r"it adapts blocks\.1\.down, which the model does not have \(and 1 more\)"):
        octavo.load_adapter(Model(blocks=1), folder / "a")


def test_damaged_files(saved):
    folder = saved
    model = Model()
    before = snapshot(model)
    where = folder / "a" / "adapter_model.safetensors"
    whole = where.read_bytes()
    where.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        octavo.load_adapter(model, folder / "a")
    where.unlink()
    (folder / "a" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which octavo does not open"):
        octavo.load_adapter(model, folder / "a")
    (folder / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        octavo.load_adapter(model, folder / "a")
    (folder / "a" / "adapter_config.json").write_text("[" * 99999)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON: it is nested too deeply"):
        octavo.load_adapter(model, folder / "a")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json; its directories a, b do: name one"):
        octavo.load_adapter(model, folder)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        octavo.load_adapter(model, folder / "nowhere")
    assert_unchanged(model, before)


def test_names_in_use(saved):
    folder = saved
    model = Model()
    octavo.load_adapter(model, folder / "a")
    before = snapshot(model)
    with pytest.raises(ValueError, match="the model has an adapter 'a' already"):
        octavo.load_adapter(model, folder / "a")
    with pytest.raises(ValueError, match="'items' cannot be the name"):
        octavo.load_adapter(model, folder / "b", "items")
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        octavo.load_adapter(model, folder / "b", dtype=torch.int32)
    assert_unchanged(model, before)
    octavo.load_adapter(model, folder / "a", "again")
    assert list(octavo.lora.list_adapters(model)) == ["a", "again"]


@pytest.mark.parametrize("changes", [{"alpha": "x"}, {"alpha": 10**400}, {"dropout": "x"}, {"use_rslora": 1}], ids=str)
def test_numbers_of_other_types(changes):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must .*, got"):
        octavo.add_lora(model, 4, **changes)
    assert_unchanged(model, before)


def test_the_base_must_have_values(saved):
    with pytest.raises(ValueError, match=r"blocks\.0\.down is on the meta device: load the model before its adapters"):
        octavo.load_adapter(Model().to("meta"), saved / "a")
