"""Saved directories: they come back as they were, are written whole or not at all, and damage is named."""

import hashlib
import json
import os
import shutil

import octavo
import pytest
import torch
from octavo.models import saved as serialization
from octavo.nn import Int8Linear, NF4Linear, SpQRLinear
from safetensors.torch import load_file, save_file
from spqr_weights import random_weight
from torch import nn

IDS = torch.arange(30).reshape(3, 10)


class Model(nn.Module):
    """A head tied to the embedding, a layer under two names, a buffer of each kind."""

    def __init__(self, width=24, bias=True):
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.up = nn.Linear(width, 40, bias=bias)
        self.down = nn.Linear(40, width, bias=False)
        self.alias = self.down
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.alias(torch.relu(self.up(x))) * self.scale
        return self.head(self.norm(x.flatten(0, 1)))


def quantized(**options):
    torch.manual_seed(0)
    model = Model().eval()
    octavo.quantize_model(model, progress=False, **options)
    return model


@pytest.fixture
def saved(tmp_path):
    octavo.save_quantized(quantized(), tmp_path / "saved")
    return tmp_path / "saved"


def assert_same_model(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype is right[name].dtype
        assert torch.equal(left[name], right[name]), name


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("target", ["factory", "instance", "meta", "quantized"])
def test_round_trip(tmp_path, keep, target):
    model = quantized(threshold=2.0, keep_outliers=keep, calibration=[IDS] if keep else None)
    octavo.save_quantized(model, tmp_path / "saved")
    with torch.device("meta"):
        meta = Model()
    meta.scale = torch.tensor(0.5)
    given = {"factory": Model, "instance": Model(), "meta": meta, "quantized": quantized()}[target]
    loaded = octavo.load_quantized(tmp_path / "saved", given)
    assert given is Model or loaded is given
    assert_same_model(loaded, model)
    assert type(loaded.up) is Int8Linear
    assert loaded.up.threshold == 2.0
    assert loaded.up.kept_columns == model.up.kept_columns
    assert bool(loaded.up.kept_columns) == keep
    assert loaded.alias is loaded.down
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.up.bias.requires_grad
    assert torch.equal(loaded.eval()(IDS), model(IDS))


def test_tied_tensors_are_stored_once(saved):
    names = set(load_file(saved / "octavo.safetensors"))
    assert {"embed.weight", "head.weight"} & names == {"embed.weight"}
    assert {name for name in names if "weight_scale" in name} == {"up.weight_scale", "down.weight_scale"}
    assert json.loads((saved / "octavo.json").read_text())["tied"]["head.weight"] == "embed.weight"


def test_views_of_one_memory_are_stored_apart(tmp_path):
    model = quantized()
    memory = torch.rand(30)
    model.norm.running_mean, model.norm.running_var = memory[:24], memory[6:]  # they overlap
    octavo.save_quantized(model, tmp_path / "saved")
    assert_same_model(octavo.load_quantized(tmp_path / "saved", Model), model)


def test_the_directory_holds_json_and_safetensors_only(saved):
    assert sorted(os.listdir(saved)) == ["octavo.json", "octavo.safetensors"]
    manifest = json.loads((saved / "octavo.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["octavo_version"] == octavo.__version__
    assert manifest["model"] == {"class": "Model", "transformers": False}
    up = {"in_features": 24, "out_features": 40, "bias": True, "threshold": 6.0, "kept_columns": 0, "method": "int8"}
    assert manifest["method"] == "int8"
    assert manifest["modules"]["up"] == up
    assert set(manifest["modules"]) == {"up", "down", "alias"}


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_model_is_rebuilt_from_the_directory_alone(tmp_path, tie):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = transformers.LlamaConfig(num_attention_heads=2, tie_word_embeddings=tie, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.max_new_tokens = 7
    octavo.quantize_model(model, progress=False)
    octavo.save_quantized(model, tmp_path / "saved")
    loaded = octavo.load_quantized(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7
    assert_same_model(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    os.remove(tmp_path / "saved" / "config.json")
    with pytest.raises(FileNotFoundError, match=r"no config\.json, which a LlamaForCausalLM needs"):
        octavo.load_quantized(tmp_path / "saved")


# ---- written whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [None, "empty", "older"])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error, existing):
    target = tmp_path / "saved"
    if existing == "empty":
        target.mkdir()
    if existing == "older":
        octavo.save_quantized(quantized(), target)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    directories = [p for p in tmp_path.rglob("*") if p.is_dir()]

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(serialization, "save_file", interrupted)
    with pytest.raises(type(error)):
        octavo.save_quantized(quantized(threshold=1.0), target, overwrite=existing == "older")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p for p in tmp_path.rglob("*") if p.is_dir()] == directories


def test_existing_directories(tmp_path, saved):
    model = quantized(threshold=1.0)
    with pytest.raises(FileExistsError, match=r"saved exists and holds 2 entries; pass overwrite=True"):
        octavo.save_quantized(model, saved)
    octavo.save_quantized(model, saved, overwrite=True)
    assert octavo.load_quantized(saved, Model).up.threshold == 1.0
    assert os.listdir(tmp_path) == ["saved"]
    (tmp_path / "empty").mkdir()
    octavo.save_quantized(model, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"was not written by octavo \(it has no octavo\.json\)"):
        octavo.save_quantized(model, tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not a directory"):
        octavo.save_quantized(model, tmp_path / "file", overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        octavo.save_quantized(model, tmp_path / "no" / "parent")


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"Model holds no octavo\.nn\.Int8Linear"):
        octavo.save_quantized(Model(), tmp_path / "saved")
    model = quantized()
    with torch.no_grad():
        model.up.weight_scale[3] = torch.inf
    with pytest.raises(ValueError, match="up: weight_scale has 1 non-finite values of 40"):
        octavo.save_quantized(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        octavo.save_quantized(quantized().to("meta"), tmp_path / "saved")
    with pytest.raises(ValueError, match="itself a quantized layer, Int8Linear"):
        octavo.save_quantized(Int8Linear(2, 2), tmp_path / "saved")
    assert os.listdir(tmp_path) == []


# ---- damage --------------------------------------------------------------------------------------------------------


def test_missing_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        octavo.load_quantized(tmp_path / "nowhere", Model)
    for file in ("octavo.safetensors", "octavo.json"):
        shutil.copytree(saved, tmp_path / file)
        os.remove(tmp_path / file / file)
        with pytest.raises(FileNotFoundError, match=f"{file} does not exist"):
            octavo.load_quantized(tmp_path / file, Model)


def test_truncated_and_changed_tensor_files(saved):
    file = saved / "octavo.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=rf"truncated: it has {len(data) - 7} bytes, octavo\.json says {len(data)}"):
        octavo.load_quantized(saved, Model)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"was changed: its SHA-256 is [0-9a-f]{64}, octavo\.json says"):
        octavo.load_quantized(saved, Model)
    file.write_bytes(b"\xff" * len(data))
    reseal(saved)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        octavo.load_quantized(saved, Model)


def reseal(path, change=lambda manifest: None):
    """Change the manifest, and make it agree with the tensor file's size and digest again."""
    manifest = json.loads((path / "octavo.json").read_text())
    data = (path / "octavo.safetensors").read_bytes()
    manifest["tensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replaced = change(manifest)
    (path / "octavo.json").write_text(json.dumps(manifest if replaced is None else replaced))


BAD_MANIFEST = {
    "newer": (lambda m: m.update(format_version=2), r"has format_version 2; octavo .* reads 1"),
    "no version": (lambda m: m.pop("format_version") and None, "has format_version None"),
    "method": (lambda m: m.update(method="nf9"), "has method 'nf9'"),
    "list": (lambda m: [1], "must hold an object, got list"),
    "no modules": (lambda m: m.pop("modules") and None, "the manifest has modules = None"),
    "module": (lambda m: m["modules"].update(up=3), "module 'up' must be an object, got 3"),
    "size": (lambda m: m["modules"]["up"].update(in_features="24"), "module 'up' has in_features = '24'"),
    "truth": (lambda m: m["modules"]["up"].update(in_features=True), "module 'up' has in_features = True"),
    "threshold": (lambda m: m["modules"]["up"].update(threshold=-6), "module 'up': threshold must be .* got -6"),
    "shape": (
        lambda m: m["modules"]["up"].update(in_features=23),
        r"up: weight must be int8 \[40, 23\], got int8 \[40, 24\]",
    ),
    "no bias": (lambda m: m["modules"]["up"].update(bias=False), r"up: has tensors .*octavo\.json says"),
    "kept": (lambda m: m["modules"]["up"].update(kept_columns=2), r"up: has tensors .*octavo\.json says"),
    "stranger": (lambda m: m["modules"].update(other=m["modules"]["up"]), "other: has tensors"),
    "tied": (lambda m: m["tied"].update({"head.weight": "gone"}), "tied to 'gone', but 'gone' is missing"),
    "tied twice": (lambda m: m["tied"].update({"up.bias": "embed.weight"}), "but 'up.bias' is stored too"),
    "tied type": (lambda m: m["tied"].update({"head.weight": 1}), "tied 'head.weight' must name a tensor, got 1"),
}


@pytest.mark.parametrize("case", BAD_MANIFEST)
def test_bad_manifest(saved, case):
    change, message = BAD_MANIFEST[case]
    reseal(saved, change)
    with pytest.raises(ValueError, match=message):
        octavo.load_quantized(saved, Model)


def test_manifest_that_is_not_json(saved):
    (saved / "octavo.json").write_text('{"format_version": 1')
    with pytest.raises(ValueError, match=r"octavo\.json is not JSON"):
        octavo.load_quantized(saved, Model)


BAD_TENSORS = {
    "nan scale": ({"up.weight_scale": torch.full((40,), torch.nan)}, "up: weight_scale has 40 non-finite values of 40"),
    "scale shape": (
        {"up.weight_scale": torch.ones(39)},
        r"up: weight_scale must be float32 \[40\], got float32 \[39\]",
    ),
    "weight dtype": ({"up.weight": torch.zeros(40, 24)}, "up: weight must be int8"),
    "gone": ({"up.weight_scale": None}, r"up: has tensors \['bias', 'weight'\]"),
    "extra": ({"extra": torch.zeros(1)}, "has extra, which Model does not"),
    "missing": ({"norm.bias": None}, r"Model has norm\.bias, which the file does not"),
    "shape": ({"norm.bias": torch.zeros(25)}, r"norm\.bias has shape \[25\], the model's has \[24\]"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named_before_the_model_changes(saved, case):
    change, message = BAD_TENSORS[case]
    tensors = load_file(saved / "octavo.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, saved / "octavo.safetensors")
    reseal(saved)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        octavo.load_quantized(saved, model)
    assert type(model.up) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_do_not_fit(saved):
    with pytest.raises(ValueError, match=r"holds a Model, which is not a transformers model: pass model=, a Model"):
        octavo.load_quantized(saved)
    with pytest.raises(ValueError, match="a layer up, which Sequential does not have"):
        octavo.load_quantized(saved, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"up has .* = \(24, 40, True\), the model's has \(24, 40, False\)"):
        octavo.load_quantized(saved, Model(bias=False))
    model = Model()
    model.up = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="up is a Conv2d in Model, not a Linear"):
        octavo.load_quantized(saved, model)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="buffer scale of Model is on the meta device and not in"):
        octavo.load_quantized(saved, model)


def test_a_manifest_cannot_name_any_class(saved):
    pytest.importorskip("transformers")
    for name in ("os", "Trainer", "NoSuchModel"):
        reseal(saved, lambda m, name=name: m.update(model={"class": name, "transformers": True}))
        with pytest.raises(ValueError, match=f"has no model class '{name}'"):
            octavo.load_quantized(saved)


# ---- SpQR ----------------------------------------------------------------------------------------------------------


class Wide(Model):
    def __init__(self):
        super().__init__(width=32)
        self.down = nn.Linear(48, 32, bias=False)
        self.up = nn.Linear(32, 48)
        self.alias = self.down


def spqr_model(mixed=False, **options):
    torch.manual_seed(0)
    model = Wide().eval()
    model.up = SpQRLinear.from_weight(random_weight(48, 32, outliers=0.1, **options), model.up.bias)
    if mixed:
        model.down = Int8Linear.from_linear(model.down)
    else:
        model.down = SpQRLinear.from_weight(random_weight(32, 48, bits=4, bilevel=False, perm=False))
    model.alias = model.down
    return model


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("target", ["factory", "meta", "other"])
def test_spqr_round_trip(tmp_path, mixed, target):
    model = spqr_model(mixed, stats_group_size=32, scale_bits=4, zero_bits=2)
    octavo.save_quantized(model, tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "octavo.json").read_text())
    assert manifest["method"] == ("mixed" if mixed else "spqr")
    assert manifest["format_version"] == 1
    sizes = {"in_features": 32, "out_features": 48, "bias": True}
    options = {"bits": 3, "group_size": 16, "stats_group_size": 32, "scale_bits": 4, "zero_bits": 2}
    found = {"bilevel": True, "perm": True, "outliers": model.up.outlier_count}
    assert manifest["modules"]["up"] == {"method": "spqr", **sizes, **options, **found}
    with torch.device("meta"):
        meta = Wide()
    meta.scale = torch.tensor(0.5)
    given = {"factory": Wide, "meta": meta, "other": spqr_model(seed=5)}[target]
    loaded = octavo.load_quantized(tmp_path / "saved", given)
    assert_same_model(loaded, model)
    assert loaded.up.options == model.up.options
    assert type(loaded.down) is type(model.down)
    assert loaded.alias is loaded.down
    assert loaded.up.bias.requires_grad
    assert torch.equal(loaded.eval()(IDS), model(IDS))


def test_a_tensor_of_two_layers_is_stored_once(tmp_path):
    model = spqr_model()
    model.down.unit = model.up.unit
    octavo.save_quantized(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "octavo.safetensors").keys()
    assert sum(name.endswith(".unit") for name in names) == 1
    loaded = octavo.load_quantized(tmp_path / "saved", Wide)
    assert loaded.down.unit is loaded.up.unit
    assert_same_model(loaded, model)


def test_directories_of_before_spqr_are_read(saved):
    reseal(saved, lambda m: [config.pop("method") for config in m["modules"].values()] and None)
    assert_same_model(octavo.load_quantized(saved, Model), quantized())


BAD_SPQR = {
    "bits": (lambda m: m.update(bits=5), "module 'up': bits must be 2, 3 or 4, got 5"),
    "stats": (
        lambda m: m.update(stats_group_size=0),
        "module 'up': stats_group_size must be a multiple of 16 up to 1024, got 0",
    ),
    "width": (lambda m: m.update(in_features=40), "module 'up': in_features must be a multiple of group_size 16"),
    "sign": (lambda m: m.update(out_features=-48), "module 'up': in_features and out_features are 32 and -48"),
    "type": (lambda m: m.update(bilevel=1), "module 'up' has bilevel = 1"),
    "absent": (lambda m: m.pop("zero_bits"), "module 'up' has zero_bits = None"),
    "method": (lambda m: m.update(method="nf9"), "module 'up' has method = 'nf9'"),
    "int8": (lambda m: m.update(method="int8"), "module 'up' has threshold = None"),
    "outliers": (lambda m: m.update(outliers=7), r"up: has \d+ outliers, not 7"),
    "perm": (lambda m: m.update(perm=False), r"up: has tensors .*octavo\.json says"),
    "split": (lambda m: m.update(scale_bits=4), r"up: statistics must be uint8 \[3, 2, 14\], got uint8 \[3, 2, 12\]"),
}


@pytest.mark.parametrize("case", BAD_SPQR)
def test_bad_spqr_manifest(tmp_path, case):
    change, message = BAD_SPQR[case]
    octavo.save_quantized(spqr_model(), tmp_path / "saved")
    reseal(tmp_path / "saved", lambda m: change(m["modules"]["up"]) and None)
    model = Wide()
    with pytest.raises(ValueError, match=message):
        octavo.load_quantized(tmp_path / "saved", model)
    assert type(model.up) is nn.Linear


def test_spqr_values_are_checked_before_saving_and_loading(tmp_path):
    model = spqr_model()
    octavo.save_quantized(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "octavo.safetensors")
    tensors["up.row_offsets"][3] = -1
    save_file(tensors, tmp_path / "saved" / "octavo.safetensors")
    reseal(tmp_path / "saved")
    with pytest.raises(ValueError, match="up: row_offsets decrease at row 2"):
        octavo.load_quantized(tmp_path / "saved", Wide())
    model.up.unit.zero_()
    with pytest.raises(ValueError, match=r"up: unit must be one positive number, got \[0.0\]"):
        octavo.save_quantized(model, tmp_path / "again")
    assert os.listdir(tmp_path) == ["saved"]


# ---- nf4 -------------------------------------------------------------------------------------------------------------


def nf4_model(mixed=False, **options):
    torch.manual_seed(0)
    model = Model().eval()
    model.up = NF4Linear.from_linear(model.up.bfloat16(), **options)
    model.down = (Int8Linear if mixed else NF4Linear).from_linear(model.down)
    model.alias = model.down
    return model


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("target", ["factory", "meta", "other"])
def test_nf4_round_trip(tmp_path, mixed, target):
    model = nf4_model(mixed, quant_type="nf3", blocksize=32, double_quant=True)
    octavo.save_quantized(model, tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "octavo.json").read_text())
    assert manifest["method"] == ("mixed" if mixed else "nf4")
    sizes = {"in_features": 24, "out_features": 40, "bias": True}
    options = {"quant_type": "nf3", "blocksize": 32, "double_quant": True, "weight_dtype": "bfloat16"}
    assert manifest["modules"]["up"] == {"method": "nf4", **sizes, **options}
    with torch.device("meta"):
        meta = Model()
    meta.scale = torch.tensor(0.5)
    given = {"factory": Model, "meta": meta, "other": nf4_model(blocksize=64)}[target]
    loaded = octavo.load_quantized(tmp_path / "saved", given)
    assert_same_model(loaded, model)
    assert repr(loaded.up) == repr(model.up)
    assert loaded.up.weight_dtype is torch.bfloat16
    assert type(loaded.down) is type(model.down)
    assert loaded.alias is loaded.down
    assert [name for name, p in loaded.up.named_parameters() if p.requires_grad] == ["bias"]
    assert torch.equal(loaded.eval()(IDS), model(IDS))


BAD_NF4 = {
    "type": (lambda m: m.update(quant_type="int4"), "module 'up': quant_type must be one of .* got 'int4'"),
    "blocksize": (lambda m: m.update(blocksize=48), "module 'up': blocksize must be a power of two .* got 48"),
    "kind": (lambda m: m.update(blocksize="64"), "module 'up' has blocksize = '64'"),
    "dtype": (lambda m: m.update(weight_dtype="float64"), "module 'up': weight_dtype is 'float64'"),
    "double": (lambda m: m.update(double_quant=True), r"up: has tensors .*octavo\.json says"),
    "absent": (lambda m: m.update(double_quant=None), "module 'up' has double_quant = None"),
    "other": (lambda m: m.update(blocksize=32), r"up: absmax must be float32 \[30\], got float32 \[15\]"),
    "bits": (lambda m: m.update(quant_type="nf3"), r"up: weight must be uint8 \[360\], got uint8 \[480\]"),
}


@pytest.mark.parametrize("case", BAD_NF4)
def test_bad_nf4_manifest(tmp_path, case):
    change, message = BAD_NF4[case]
    octavo.save_quantized(nf4_model(), tmp_path / "saved")
    reseal(tmp_path / "saved", lambda m: change(m["modules"]["up"]) and None)
    model = Model()
    with pytest.raises(ValueError, match=message):
        octavo.load_quantized(tmp_path / "saved", model)
    assert type(model.up) is nn.Linear


def test_nf4_scales_are_checked_before_saving_and_loading(tmp_path):
    model = nf4_model(double_quant=True)
    octavo.save_quantized(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "octavo.safetensors")
    tensors["up.nested_absmax"][0] = torch.inf
    save_file(tensors, tmp_path / "saved" / "octavo.safetensors")
    reseal(tmp_path / "saved")
    with pytest.raises(ValueError, match="up: nested_absmax has 1 non-finite values of 1"):
        octavo.load_quantized(tmp_path / "saved", Model())
    model.up.offset.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="up: offset has 1 non-finite values of 1"):
        octavo.save_quantized(model, tmp_path / "again")
