"""quantize_model: what it replaces, what it leaves alone and says so, and that a failure changes nothing."""

import copy
import json
import weakref

import octavo
import pytest
import torch
from octavo.nn import Int8Linear, NF4Linear
from rich.progress import Progress
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks, a block that appears twice, and a head tied to the embedding."""

    def __init__(self, width=32, vocabulary=50):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.again = self.blocks[0]
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.lm_head = nn.Linear(width, 3)

    def forward(self, ids, scale=1.0):
        x = self.embed(ids) * scale
        for block in (*self.blocks, self.again):
            x = block(x)
        return self.head(x), self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


IDS = torch.arange(50).reshape(5, 10)


def layers_of(model):
    return {name: type(m) for name, m in model.named_modules(remove_duplicate=False) if hasattr(m, "in_features")}


def test_replaces_linears_in_place(model):
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:
        block.up, block.down = Int8Linear.from_linear(block.up), Int8Linear.from_linear(block.down)
    report = octavo.quantize_model(model, progress=False)
    quantized = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert [layer.name for layer in report.layers] == quantized
    assert report.skipped == {"head": "its weight is shared with another module", "lm_head": "as asked"}
    assert all(type(model.get_submodule(name)) is Int8Linear for name in quantized)
    assert type(model.head) is type(model.lm_head) is nn.Linear
    assert model.head.weight is model.embed.weight
    assert model.again.up is model.blocks[0].up
    assert model.blocks[0].up.threshold == 6.0
    assert all(torch.equal(a, b) for a, b in zip(model(IDS), by_hand(IDS), strict=True))


def test_shared_modules_stay_shared():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = octavo.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == ["0"]
    assert type(model[0]) is Int8Linear
    assert model[0] is model[2]


@pytest.mark.parametrize("skip", [("blocks.1.up", "head"), "blocks.1.up", ["up"], []])
def test_skip_matches_names_and_last_components(model, skip):
    octavo.quantize_model(model, skip=skip, progress=False)
    kinds = layers_of(model)
    assert kinds["blocks.1.up"] is (nn.Linear if skip else Int8Linear)
    assert kinds["blocks.0.up"] is (nn.Linear if skip == ["up"] else Int8Linear)
    assert kinds["blocks.1.down"] is kinds["lm_head"] is Int8Linear


def test_what_cannot_be_replaced_is_left_and_named(model):
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model.special = Special(4, 4)
    model.computed = nn.Linear(4, 4)
    weight = model.computed._parameters.pop("weight")
    model.computed.weight = weight * 2
    model.hooked = nn.Linear(4, 4)
    model.hooked.register_forward_hook(lambda *_: None)
    model.wide = nn.Linear(131072, 1)
    report = octavo.quantize_model(model, progress=False)
    assert type(model.special) is Special
    assert {name: report.skipped.get(name) for name in ("computed", "hooked", "wide", "special")} == {
        "computed": "its weight is not a parameter",
        "hooked": "it has hooks, which a new module would lose",
        "wide": "in_features 131072 is more than 131071",
        "special": "what its class Special does beside a product would be lost, 80 B",  # not a torch.nn.Linear at all
    }


def test_report(model):
    before = sum(t.numel() * 4 for t in model.parameters())
    report = octavo.quantize_model(model, progress=False)
    up, down = report.layers[:2]
    assert (up.shape, up.bytes_before, up.bytes_after) == ((64, 32), 4 * 64 * 33, 64 * 32 + 4 * 64 + 4 * 64)
    assert (down.shape, down.bytes_before, down.bytes_after) == ((32, 64), 4 * 32 * 64, 32 * 64 + 4 * 32)
    assert report.bytes_before == 2 * (up.bytes_before + down.bytes_before)
    assert report.model_bytes_before == before
    assert before - report.model_bytes_after == report.bytes_before - report.bytes_after
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["method"] == "int8"
    assert data["layers"][0]["bytes_after"] == up.bytes_after
    assert data["bytes_after"] == report.bytes_after
    for text in (str(report), _render(report)):
        assert "blocks.1.down" in text
        assert "its weight is shared with another module" in text


def _render(report):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def test_progress_goes_to_standard_error_and_to_the_end(model, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, count: done.append(count))
    octavo.quantize_model(model)
    assert done == [1] * 4
    assert tuple(capsys.readouterr()) == ("", "octavo: quantizing (4)\n")


def test_layers_are_freed_one_by_one(model, monkeypatch):
    alive, most = weakref.WeakSet(model.get_submodule(name) for name in layers_of(model)), []
    convert = Int8Linear.from_linear.__func__

    def watch(cls, *args):
        most.append(len(alive))
        return convert(cls, *args)

    monkeypatch.setattr(Int8Linear, "from_linear", classmethod(watch))
    octavo.quantize_model(model, progress=False)
    assert most == [6, 5, 4, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(model, dtype):
    octavo.quantize_model(model.to(dtype), progress=False)
    assert model(IDS)[0].dtype is dtype


def test_meta_model():
    with torch.device("meta"):
        model = Model()
    octavo.quantize_model(model, progress=False)
    assert model.blocks[0].up.weight.is_meta
    assert model(IDS.to("meta"))[0].shape == (5, 10, 50)


# ---- nf4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_replaces_what_int8_does(model, double_quant):
    by_hand = copy.deepcopy(model)
    options = {"quant_type": "fp4", "blocksize": 32, "double_quant": double_quant}
    for block in by_hand.blocks:
        block.up, block.down = (NF4Linear.from_linear(linear, **options) for linear in (block.up, block.down))
    report = octavo.quantize_model(model, method="nf4", progress=False, **options)
    quantized = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert [layer.name for layer in report.layers] == quantized
    assert report.skipped == {"head": "its weight is shared with another module", "lm_head": "as asked"}
    assert all(type(model.get_submodule(name)) is NF4Linear for name in quantized)
    assert model.again.up is model.blocks[0].up
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(a, b) for a, b in zip(model(IDS), by_hand(IDS), strict=True))
    assert repr(model.blocks[0].up) == repr(by_hand.blocks[0].up)


def test_nf4_defaults_and_shared_modules():
    shared = nn.Linear(131072, 2)  # any width
    model = nn.Sequential(shared, nn.Linear(2, 131072), shared)
    report = octavo.quantize_model(model, method="nf4", progress=False)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert model[0] is model[2]
    assert (model[0].quant_type, model[0].blocksize, model[0].double_quant) == ("nf4", 64, False)


def test_nf4_report(model):
    before = sum(t.numel() * 4 for t in model.parameters())
    report = octavo.quantize_model(model, method="nf4", double_quant=True, progress=False)
    up, down = report.layers[:2]
    scales = 64 * 32 // 64 + 4 + 4  # blocks, one absmax of them, the offset
    assert (up.bytes_before, up.bytes_after) == (4 * 64 * 33, 64 * 32 // 2 + scales + 4 * 64)
    assert up.nominal_bits == down.nominal_bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert up.real_bits == down.real_bits == 4 + 8 * scales / (64 * 32)
    assert (report.nominal_bits, report.real_bits) == (up.nominal_bits, up.real_bits)
    assert report.model_bytes_before == before
    assert before - report.model_bytes_after == report.bytes_before - report.bytes_after
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["method"], data["real_bits"]) == ("nf4", report.real_bits)
    for text in (str(report), _render(report)):
        assert "nf4 codes in blocks of 64, double quantization" in text
        assert "bits stored" in text and f"{up.real_bits:.3f}" in text
        assert "outliers" not in text


def test_nf4_of_other_dtypes_and_on_the_meta_device(model):
    octavo.quantize_model(model.bfloat16(), method="nf4", progress=False)
    assert model(IDS)[0].dtype is torch.bfloat16
    assert model.blocks[0].up.dequantize().weight.dtype is torch.bfloat16
    with torch.device("meta"):
        model = Model()
    octavo.quantize_model(model, method="nf4", double_quant=True, progress=False)
    assert model.blocks[0].up.weight.is_meta
    assert model(IDS.to("meta"))[0].shape == (5, 10, 50)


# ---- calibration ---------------------------------------------------------------------------------------------------


def spikes(model):
    """Inputs of the first layer have outliers in columns 3 (for every id) and 7 (for id 9 only)."""
    with torch.no_grad():
        model.embed.weight.clamp_(-3, 3)
        model.embed.weight[:, 3] = 20.0
        model.embed.weight[9, 7] = -30.0
    return model


def kept(module):
    return module.outlier_slot.ge(0).nonzero().flatten().tolist() if module.kept_columns else []


@pytest.mark.parametrize("as_mapping", [False, True])
def test_keeps_the_columns_that_calibration_finds(model, as_mapping):
    weight = spikes(model).blocks[0].up.weight.detach().clone()
    model.lm_head.eval()
    batches = [IDS[1:2], IDS[:1]]  # id 9 is in the second
    report = octavo.quantize_model(
        model,
        calibration=iter([{"ids": b, "scale": 1.0} for b in batches] if as_mapping else batches),
        keep_outliers=True,
        progress=False,
    )
    first = model.blocks[0].up
    assert {3, 7} <= set(kept(first))
    assert torch.equal(first.outlier_weight, weight[:, kept(first)].t())
    assert report.layers[0].kept_columns == first.kept_columns
    slots = 4 * 32 + 4 * 64 * first.kept_columns
    assert report.layers[0].bytes_after == 64 * 32 + 4 * 64 + 4 * 64 + slots
    assert model.training
    assert not model.lm_head.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calibration_is_the_union_over_batches_only(model):
    spikes(model)
    model.again = nn.Identity()
    octavo.quantize_model(model, calibration=[IDS[1:2]], keep_outliers=True, progress=False)
    assert kept(model.blocks[0].up) == [3]  # id 9, and with it column 7, was not there


# ---- failures change nothing ---------------------------------------------------------------------------------------


def broken(model):
    with torch.no_grad():
        model.blocks[1].down.weight[0, :3] = torch.nan


def failing_batches():
    yield IDS
    raise OSError("the disk is gone")


FAILURES = {
    "method": (
        {"method": "int3"},
        ValueError,
        "unknown method 'int3' .did you mean int8.*; known: int8, nf4, fp4",
    ),
    "threshold": ({"threshold": -2.0}, ValueError, "got -2.0"),
    "threshold nan": ({"threshold": float("nan")}, ValueError, "got nan"),
    "no calibration": ({"keep_outliers": True}, ValueError, "needs calibration data"),
    "calibration for nothing": ({"calibration": [IDS]}, ValueError, "needs keep_outliers=True"),
    "no threshold": ({"keep_outliers": True, "calibration": [IDS], "threshold": 0.0}, ValueError, "positive threshold"),
    "empty": ({"keep_outliers": True, "calibration": []}, ValueError, "no batches"),
    "batch": ({"keep_outliers": True, "calibration": [IDS, "text"]}, ValueError, "tensors or mappings, got str"),
    "disk": ({"keep_outliers": True, "calibration": failing_batches}, OSError, "disk is gone"),
    "nf4 threshold": (
        {"method": "nf4", "threshold": 6.0},
        ValueError,
        "nf4 has no setting threshold; it has",
    ),
    "nf4 kept": (
        {"method": "nf4", "keep_outliers": True},
        ValueError,
        "nf4 has no setting keep_outliers; it",
    ),
    "nf4 calibration": ({"method": "nf4", "calibration": [IDS]}, ValueError, "nf4 takes no calibration data"),
    "nf4 bits": (
        {"method": "nf4", "bits": 4, "tau": 1.0},
        ValueError,
        "nf4 has no setting bits, tau; it has quant",
    ),
    "nf4 type": ({"method": "nf4", "quant_type": "int4"}, ValueError, "one of nf2, nf3, nf4, nf8, fp4, got 'int4'"),
    "nf4 blocksize": ({"method": "nf4", "blocksize": 0}, ValueError, "power of two from 32 to 4096, got 0"),
    "int8 type": ({"quant_type": "nf4"}, ValueError, "int8 has no setting quant_type; it has threshold"),
    "int8 blocksize": ({"blocksize": 64}, ValueError, "int8 has no setting blocksize; it has threshold, keep_outliers"),
    "rtn double": (
        {"method": "rtn", "double_quant": True},
        ValueError,
        "rtn has no setting double_quant; it has bits",
    ),
    "all skipped": ({"skip": ["up", "down", "lm_head"]}, ValueError, "Model has no torch.nn.Linear.*\n.*as asked"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_change_nothing(model, case):
    options, error, message = FAILURES[case]
    if callable(options.get("calibration")):
        options = options | {"calibration": options["calibration"]()}
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, layers_of(model)
    with pytest.raises(error, match=message):
        octavo.quantize_model(model, progress=False, **options)
    assert layers_of(model) == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_non_finite_weights_are_found_before_anything_changes(model, method):
    broken(model)
    kinds = layers_of(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.down: .*3 of 2048 weights are NaN or Inf"):
        octavo.quantize_model(model, method=method, progress=False)
    assert layers_of(model) == kinds
    octavo.quantize_model(model, skip=["blocks.1.down"], progress=False)


def test_other_dtypes_are_an_error(model):
    with pytest.raises(ValueError, match=r"blocks\.0\.up: .*got float64"):
        octavo.quantize_model(model.double(), progress=False)
    model.float().blocks[0].up.bias.data = torch.zeros(64).double()
    kinds = layers_of(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: .*the bias must be .*got float64"):
        octavo.quantize_model(model, method="nf4", progress=False)
    assert layers_of(model) == kinds


def test_models_without_linears():
    with pytest.raises(ValueError, match=r"Conv2d has no torch\.nn\.Linear"):
        octavo.quantize_model(nn.Conv2d(1, 1, 1), progress=False)
    with pytest.raises(ValueError, match="from_linear"):
        octavo.quantize_model(nn.Linear(2, 2), progress=False)
    model = nn.Sequential(nn.Linear(4, 4))
    octavo.quantize_model(model, progress=False)
    with pytest.raises(ValueError, match="Sequential has no"):
        octavo.quantize_model(model, progress=False)  # twice


def test_encoder_layers_keep_what_their_fast_path_reads():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(layer, nn.Linear(16, 16))
    report = octavo.quantize_model(model, progress=False)
    assert [row.name for row in report.layers] == ["1"]
    assert "reads its weight itself" in report.skipped["0.linear1"]
    with torch.no_grad():
        assert model(torch.randn(2, 5, 16)).isfinite().all()


def test_a_name_to_skip_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"skip names no .* nosuch"):
        octavo.quantize_model(nn.Sequential(nn.Linear(4, 4)), skip=("nosuch",), progress=False)


def test_what_is_not_given_is_of_no_method(model):
    """None, and a switch of another method that is off, as a wrapper passes them on."""
    octavo.quantize_model(model, "int8", progress=False, bits=None, double_quant=False, simulate=False)
    with pytest.raises(ValueError, match="unknown method 3"):
        octavo.quantize_model(model, 3)
