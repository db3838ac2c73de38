"""The SpQR authors' files, written here to the letter of their formats, come back as the weight that they define."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.integrations.spqr import import_compressed_layer, import_legacy_layer, load_official, read_official
from octavo.nn import SpQRLinear
from octavo.spqr import packing
from safetensors.torch import load_file, save_file
from spqr_files import assert_defined, compressed, defined, dense, layer
from torch import Tensor, nn

# ---- one layer -----------------------------------------------------------------------------------------------------

LEGACY: dict[str, tuple[dict[str, Any], float]] = {
    "near-lossless": ({"bits": 4}, 0.0),
    "3 bits": ({}, 0.0),
    "2 bits": ({"bits": 2, "group": 32, "rows": 48}, 0.0),
    "wide groups": ({"group": 32, "rows": 16, "m": 16}, 0.0),
    "bf16": ({"dtype": torch.bfloat16}, 0.0),
    "fp32": ({"dtype": torch.float32}, 4 * 2.0**-11),
    "tiny": ({"dtype": torch.bfloat16, "scale": 1e-12}, 0.0),
    "huge": ({"dtype": torch.bfloat16, "scale": 1e9}, 0.0),
    "no outliers": ({"outliers": 0.0}, 0.0),
    "plain": ({"bilevel": False}, 0.0),
    "plain fp32": ({"bilevel": False, "dtype": torch.float32, "bits": 4}, 4 * 2.0**-11),
}


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_layers(case: str):
    options, statistics = LEGACY[case]
    made = layer(**options)
    got = import_legacy_layer(made, options.get("bits", 3))
    assert (got.n, got.k, got.bits) == (*made["quant_weights"].shape, options.get("bits", 3))
    assert got.group_size == made["groupsize"]
    assert got.stats_group_size == options.get("rows", 16)
    assert (got.second_order is None) == ("plain" in case)
    assert_defined(got, made, statistics)


@pytest.mark.parametrize("ptcsr", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02, 0.3])
def test_compressed_layers(ptcsr: bool, outliers: float):
    made = layer(outliers=outliers)
    got = import_compressed_layer(compressed(made, ptcsr))
    assert_defined(got, made)
    same = import_legacy_layer(made)
    for name in ("codes", "statistics", "second_order", "unit", "outliers", "row_offsets", "perm"):
        assert torch.equal(getattr(got, name), getattr(same, name)), name


def test_statistics_are_exact_and_normal():
    for made in (layer(), layer(dtype=torch.bfloat16, scale=1e-9)):
        got = import_legacy_layer(made)
        ss = got.second_order[..., 0]  # type: ignore[index]
        assert float(ss.abs().min()) >= 2.0**-14
        stored = torch.stack([t.flatten().double() for t in made["quant_layer_scale_qq_scale"]], 1)
        assert torch.equal(ss.double() * float(got.unit), stored)


def test_adding_whole_outliers_would_be_another_weight():
    """Their kernel adds the outlier to what the code beside it gives: what is imported is not that sum."""
    made = layer()
    added = (dense(made) + made["outliers_matrix"].to_dense().double().numpy())[:, np.argsort(made["perm"].numpy())]
    got = import_compressed_layer(compressed(made)).dequantize().double().numpy()
    weight, _ = defined(made)
    assert np.abs(added - weight).max() > 100 * np.abs(got - weight).max()


def test_wide_layers_keep_their_columns():
    """Ids from 32768 on are not negative; legacy files go beyond 65536."""
    made = layer(16, 65536, outliers=0.0001)
    assert int(made["outliers_matrix"].coalesce().indices()[1].max()) > 32768
    got = import_compressed_layer(compressed(made))
    assert_defined(got, made)
    assert int(packing.unpack_perm(got.perm, 65536).max()) == 65535  # type: ignore[arg-type]
    wide = layer(16, 65552, outliers=0.0001)
    assert_defined(import_legacy_layer(wide), wide)


def test_spoiled_columns_are_named():
    """Their converter ors a sign-extended id into the value: NaN from column 32768 on."""
    tensors = compressed(layer(16, 32784, outliers=0.0001))
    words = tensors["col_vals"]
    spoiled = (words & 0xFFFF) >= 32768
    words[spoiled] |= -65536
    with pytest.raises(ValueError, match=r"are NaN or Inf, from column 327\d\d \(their converter spoils outliers"):
        import_compressed_layer(tensors)


def test_forms_that_files_have():
    made = layer(outliers=0.0)
    tensors = compressed(made)
    tensors["col_vals"] = torch.zeros(0)  # as their converter leaves it, in fp32
    assert_defined(import_compressed_layer(tensors), made)
    made["perm"] = torch.arange(96).int()
    identity = compressed(made)
    for pairs in (identity["in_perm"], None, torch.zeros(0)):
        got = import_compressed_layer({**identity, "in_perm": pairs}, 48, 96)
        assert got.perm is None
        assert_defined(got, made)
    made["perm"] = None
    assert torch.equal(import_legacy_layer(made).dequantize(), got.dequantize())
    doubled = layer(seed=1)
    coo = doubled["outliers_matrix"].coalesce()
    halves = (torch.cat([coo.indices()] * 2, 1), torch.cat([coo.values() / 2] * 2))
    doubled["outliers_matrix"] = torch.sparse_coo_tensor(
        *halves, coo.shape, check_invariants=True
    )  # uncoalesced: entries add up
    assert_defined(import_legacy_layer(doubled), layer(seed=1), 2.0**-10)
    for convert in ("to_sparse_csr", "to_sparse_csc"):
        other = layer(seed=1)
        other["outliers_matrix"] = getattr(other["outliers_matrix"], convert)()
        assert_defined(import_legacy_layer(other), layer(seed=1))


def test_shapes_that_tensors_do_not_tell():
    made = layer(16, 256, outliers=0.0)
    tensors = {name: t for name, t in compressed(made).items() if name != "in_perm"}
    tensors["row_offsets"] = torch.zeros(17, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"that fits \[16, 256\] and \[256, 16\]; give out_features and in_features"):
        import_compressed_layer(tensors)
    assert (import_compressed_layer(tensors, 16).k, import_compressed_layer(tensors, in_features=16).n) == (256, 256)


def changed(l: dict[str, Any], name: str, value: Any) -> dict[str, Any]:  # noqa: E741
    return {**l, name: value}


GOOD = layer()
BAD_LEGACY: dict[str, tuple[str, Any, str]] = {
    "absent": ("quant_weights", None, r"quant_weights must be int8 \[out_features, in_features\], got a NoneType"),
    "dtype": ("quant_weights", GOOD["quant_weights"].int(), r"got int32 \[48, 96\]"),
    "code": (
        "quant_weights",
        GOOD["quant_weights"] + 1,
        "quant_weights must be codes of 3 bits, got values from 1 to 8",
    ),
    "shape": ("weight_shape", (48, 95), r"weight_shape is \[48, 95\], quant_weights is int8 \[48, 96\]"),
    "group": ("groupsize", None, "groupsize must be 16, 32 or 64 and divide in_features 96, got None"),
    "kept": ("keep_last_columns", 2, "keep_last_columns is 2"),
    "half": ("quant_layer_zero_qq_zero", [], "quant_layer_zero_qq_zero empty beside the others"),
    "groups": (
        "quant_layer_scale",
        GOOD["quant_layer_scale"][1:],
        "must be a list of 6 tensors, one a group, got a list of 5",
    ),
    "second": (
        "quant_layer_scale_qq_zero",
        [torch.zeros(2, 1)] * 6,
        r"qq_zero\[0\] must be .* \[3\], got float32 \[2, 1\]",
    ),
    "statistics": (
        "quant_layer_zeros",
        [torch.zeros(3, 16)] * 6,
        r"zeros\[0\] must be int8 \[3, 16\], got float32 \[3, 16\]",
    ),
    "beta2": (
        "quant_layer_scale",
        [torch.zeros(6, 8).char()] * 6,
        r"beta2 a multiple of 16, out_features 48; got int8 \[6, 8\]",
    ),
    "scale code": (
        "quant_layer_scale",
        [torch.full((3, 16), 8).char()] * 6,
        "quant_layer_scale must be codes of 3 bits",
    ),
    "nan": (
        "quant_layer_scale_qq_zero",
        [torch.full((3, 1), torch.nan)] * 6,
        "scales, zero points or outliers are NaN",
    ),
    "range": ("quant_layer_zero_qq_zero", [torch.full((3, 1), 1e6)] * 6, "beyond fp16's range.*1000000"),
    "outliers": ("outliers_matrix", torch.zeros(48, 96), r"must be a sparse tensor \[48, 96\], got float32 \[48, 96\]"),
    "outlier shape": ("outliers_matrix", torch.zeros(48, 95).to_sparse(), r"got float32 \[48, 95\]"),
    "perm": ("perm", torch.zeros(96).int(), r"perm of shape \[96\] is not a permutation of 0 ... 95"),
    "perm size": ("perm", torch.arange(95), r"perm of shape \[95\] is not a permutation of 0 ... 95"),
}


@pytest.mark.parametrize("case", BAD_LEGACY)
def test_bad_legacy_layers(case: str):
    name, value, message = BAD_LEGACY[case]
    with pytest.raises(ValueError, match=message):
        import_legacy_layer(changed(GOOD, name, value))


def test_bits_that_octavo_lacks():
    for bits in ((8, 3, 3), (3, 5, 3), (3, 3, 0)):
        with pytest.raises(ValueError, match=f"got {next(b for b in bits if b != 3)}"):
            import_legacy_layer(GOOD, *bits)


WORDS = compressed(GOOD)


FULL = int(WORDS["row_offsets"][1])  # row 1 has an outlier in each column


def with_entry(at: int, value: int) -> Tensor:
    out = WORDS["col_vals"].clone()
    out[at] = value
    return out


BAD_COMPRESSED: dict[str, tuple[str, Any, str]] = {
    "absent": ("dense_weights", None, "dense_weights must be int64 with one dimension, got a NoneType"),
    "dtype": ("row_offsets", WORDS["row_offsets"].long(), r"row_offsets must be int32 .*, got int64 \[49\]"),
    "entries": ("col_vals", WORDS["col_vals"].float(), "col_vals must be int32 with one dimension, got float32"),
    "truncated": ("dense_weights", WORDS["dense_weights"][:-16], "has 272 dense_weights, 49 row_offsets, 48 in_perm"),
    "offsets": ("row_offsets", WORDS["row_offsets"][:-1], "no weight of multiples of 16 has"),
    "perm size": ("in_perm", WORDS["in_perm"][:-1], "47 in_perm: the tensors do not fit together"),
    "perm": ("in_perm", torch.zeros(48).int(), r"in_perm of shape \[96\] is not a permutation"),
    "ends": (
        "col_vals",
        WORDS["col_vals"][:-1],
        r"row_offsets must ascend from 0 to \d+ .col_vals., got from 0 to \d+",
    ),
    "falls": ("row_offsets", WORDS["row_offsets"][[0, *range(2, 48), 1, 48]], "falling in between"),
    "column": ("col_vals", with_entry(0, 0x3C00 << 16 | 96), "an outlier of row 0 has column 96, in_features is 96"),
    "twice": ("col_vals", with_entry(FULL + 1, int(WORDS["col_vals"][FULL])), "two outliers at row 1, column 0"),
    "nan": ("col_vals", with_entry(0, 0x7E00 << 16), r"1 of \d+ outliers are NaN or Inf, from column 0$"),
    "unused bits": ("dense_weights", WORDS["dense_weights"] | 1 << 62, "bits 62 and 63 of word 0 are not 0"),
    "copies": ("dense_weights", WORDS["dense_weights"] ^ torch.eye(288).long()[21] << 54, r"in tile \[0, 1\] differ"),
}


@pytest.mark.parametrize("case", BAD_COMPRESSED)
def test_bad_compressed_layers(case: str):
    name, value, message = BAD_COMPRESSED[case]
    with pytest.raises(ValueError, match=message):
        import_compressed_layer(changed(WORDS, name, value))


def test_bad_compressed_shapes():
    with pytest.raises(ValueError, match=r"no weight \[64, \?\] of multiples of 16 has 288 dense_weights"):
        import_compressed_layer(WORDS, 64)
    with pytest.raises(ValueError, match="multiples of 16, got in_features 90"):
        import_compressed_layer(WORDS, 48, 90)


# ---- directories ---------------------------------------------------------------------------------------------------

NAMES = ("attn.q_proj", "mlp.down")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(96, 48)})
        self.mlp = nn.ModuleDict({"down": nn.Linear(48, 96, bias=False)})
        self.norm = nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down"](self.attn["q_proj"](self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 96)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(96, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def made_layers() -> dict[str, dict[str, Any]]:
    shapes = {"attn.q_proj": (48, 96), "mlp.down": (96, 48)}
    return {f"{i}.{name}": layer(*shapes[name], seed=i) for i in range(2) for name in NAMES}


def others() -> dict[str, Tensor]:
    """As main.py finds them: every parameter but the layers' weights, a tied one once."""
    torch.manual_seed(1)
    quantized = [f"layers.{name}.weight" for name in made_layers()]
    return {name: p for name, p in Model().named_parameters() if name not in quantized}


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    path = tmp_path / "legacy"
    for name, made in made_layers().items():
        index, _, leaf = name.partition(".")
        (path / index).mkdir(parents=True, exist_ok=True)
        torch.save(made, path / index / leaf)
    args = {"model_path": "llama", "wbits": 3, "groupsize": 16, "qq_groupsize": 16, "qq_scale_bits": 3}
    torch.save(args | {"qq_zero_bits": 3, "outlier_threshold": 0.2, "load": None, "save": "x"}, path / "args.pt")
    torch.save(others(), path / "not_quantized_weights.pt")
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    path = tmp_path / "hub"
    path.mkdir()
    tensors = {name: p.detach().half() for name, p in others().items()}
    for i, (name, made) in enumerate(made_layers().items()):
        parts = compressed(made, ptcsr=i % 2 == 1)
        tensors |= {f"layers.{name}.{part}": t for part, t in parts.items()}
    names = sorted(tensors)
    for i, shard in enumerate((names[:7], names[7:])):  # a layer's tensors may be in two files
        save_file({name: tensors[name] for name in shard}, path / f"model-0000{i + 1}-of-00002.safetensors")
    config = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return path


def check_loaded(model: Any, other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, made in made_layers().items():
        module = model.get_submodule(f"layers.{name}")
        assert type(module) is SpQRLinear
        assert_defined(module.packed_weight, made)
    state = model.state_dict()
    for name, value in other.items():
        torch.testing.assert_close(state[name], value.detach(), rtol=tolerance, atol=tolerance)
    assert model.head.weight is model.embed.weight
    assert model.layers[0].attn["q_proj"].bias.requires_grad
    assert model(torch.arange(4)).isfinite().all()


def test_legacy_directories(legacy: Path):
    found = read_official(legacy)
    assert list(found.layers) == list(made_layers())
    assert found.tensors.keys() == others().keys()
    for name, made in made_layers().items():
        assert_defined(found.layers[name], made)
    model = Model()
    assert load_official(str(legacy), model) is model
    check_loaded(model, others())


def test_directories_of_transformers(hub: Path):
    found = read_official(hub)
    assert set(found.layers) == {f"layers.{name}" for name in made_layers()}
    check_loaded(load_official(hub, Model()), others(), 1e-3)
    save_file(
        {k: v for f in hub.glob("*.safetensors") for k, v in load_file(f).items()}, hub.parent / "one.safetensors"
    )
    check_loaded(load_official(hub.parent / "one.safetensors", Model()), others(), 1e-3)
    state = {k: v for f in hub.glob("*.safetensors") for k, v in load_file(f).items()}
    torch.save(state, hub.parent / "state.pt")
    check_loaded(load_official(hub.parent / "state.pt", Model()), others(), 1e-3)


def test_pickled_layers_are_read_without_their_class(legacy: Path, monkeypatch: pytest.MonkeyPatch):
    """The converter's --save_per_layer: modules of a class that is not here when they are read."""
    for module_name in ("spqr_quant.inference", "inference"):
        module = types.ModuleType(module_name)

        class QuantizedLinear(nn.Module):
            __module__, __qualname__ = module_name, "QuantizedLinear"

        module.QuantizedLinear = QuantizedLinear  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module_name.partition(".")[0], module)  # the package of the module, too
        monkeypatch.setitem(sys.modules, module_name, module)
        for name, made in made_layers().items():
            index, _, leaf = name.partition(".")
            theirs = QuantizedLinear()
            for part, tensor in compressed(made).items():
                setattr(theirs, part, nn.Parameter(tensor, requires_grad=False))
            theirs.m, theirs.n = made["quant_weights"].shape
            theirs.bits, theirs.beta1, theirs.beta2 = 3, 16, 16
            torch.save(theirs, legacy / index / leaf)
        monkeypatch.delitem(sys.modules, module_name)
        check_loaded(load_official(legacy, Model()), others())


def test_unquantized_parameters_may_be_on_the_meta_device(legacy: Path):
    with torch.device("meta"):
        model = Model()
    model.head.weight = model.embed.weight
    loaded: Any = load_official(legacy, model)
    assert not any(t.is_meta for name, t in loaded.state_dict().items() if name != "head.weight")
    loaded.head.weight = loaded.embed.weight  # the model's own business, as it has no tie_weights
    check_loaded(loaded, others())


class Runs:
    """What a pickle could do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_nothing_in_a_file_is_run(legacy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for file in (legacy / "0" / "mlp.down", legacy / "args.pt", legacy / "not_quantized_weights.pt"):
        before = file.read_bytes()
        torch.save({"wbits": Runs()}, file)
        with pytest.raises(ValueError, match=rf"{file} holds \S*exec, and octavo runs nothing from a file"):
            read_official(legacy)
        file.write_bytes(before)
    torch.save(Model(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds \S*Model.*save the state_dict\(\)"):
        read_official(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_files(legacy: Path, hub: Path, tmp_path: Path):
    model = Model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_official(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has neither args\.pt .* nor config\.json"):
        read_official(tmp_path)
    file = legacy / "1" / "attn.q_proj"
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"text"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file} is damaged or not of torch\.save"):
            load_official(legacy, model)
    torch.save(changed(GOOD, "groupsize", 8), file)
    with pytest.raises(ValueError, match=rf"{file}: groupsize must be 16, 32 or 64"):
        load_official(legacy, model)
    torch.save([1], file)
    with pytest.raises(ValueError, match=rf"{file} must hold a layer, got a list"):
        load_official(legacy, model)
    shard = hub / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00002\.safetensors is not a whole safetensors file"):
        load_official(hub, model)
    shard.unlink()
    with pytest.raises(ValueError, match=r"hub: layers\.\S+: \w+ must be int\d\d with one dimension, got a NoneType"):
        load_official(hub, model)
    config = {"quant_method": "spqr", "bits": 4}
    (hub / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(ValueError, match=r"config\.json: bits is 4; the compressed format has 3 only"):
        read_official(hub)
    (hub / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="must have quant_method 'spqr', got 'gptq'"):
        read_official(hub)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(model.layers[0].attn["q_proj"]) is nn.Linear


def test_models_that_do_not_fit(legacy: Path):
    class Narrow(Model):
        def __init__(self) -> None:
            super().__init__()
            self.layers[1].mlp["down"] = nn.Linear(48, 80, bias=False)

    with pytest.raises(ValueError, match=r"1\.mlp\.down is \[96, 48\], layers\.1\.mlp\.down of the model \[80, 48\]"):
        load_official(legacy, Narrow())
    with pytest.raises(ValueError, match=r"Sequential must have one Linear layer 0\.attn\.q_proj, and has none"):
        load_official(legacy, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"ModuleList must have .* has 2: 0\.layers\.0\.attn\.q_proj, 1\.layers"):
        load_official(legacy, nn.ModuleList([Model(), Model()]))
    rest = others()
    torch.save(rest | {"extra": torch.zeros(1)}, legacy / "not_quantized_weights.pt")
    with pytest.raises(ValueError, match="has extra, which Model does not"):
        load_official(legacy, Model())
    del rest["layers.0.norm.weight"]
    torch.save(rest, legacy / "not_quantized_weights.pt")
    with pytest.raises(ValueError, match=r"does not have layers\.0\.norm\.weight of Model; strict=False leaves them"):
        load_official(legacy, Model())
    check_loaded(load_official(legacy, Model(), strict=False), rest)
