"""What longer runs of these tests have found, each case once more."""

from __future__ import annotations

import json

import octavo
import pytest
import torch
from calls import run_case
from children import in_child


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("spqr_linear", 1796142799736),  # one outlier fewer than row_offsets say: read past the end
        ("spqr_dequantize", 1796142809656),
        ("optim_table", 1796142827792),  # an absmax of a parameter without elements: the fake counted a block
    ],
)
def test_operators(name, number):
    problem, _ = in_child(lambda n: run_case(name, n), iter([number]))
    assert not problem


@pytest.mark.parametrize("ends", [-1, 1])
def test_row_offsets_of_spqr_end_with_the_outliers(ends):
    linear = torch.nn.Linear(64, 32)
    model = torch.nn.Sequential(linear)
    octavo.quantize_model(model, "spqr", calibration=[torch.randn(256, 64)], tau=0.05, progress=False)
    layer = model[0]
    assert layer.outlier_count > 1
    layer.row_offsets[-1] += ends
    with pytest.raises(RuntimeError, match="row_offsets must end with the number of entries"):
        layer(torch.randn(2, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(method=["int8"]), r"has method \['int8'\]"),
        (lambda m: m["modules"]["0"].update(method=["int8"]), r"module '0' has method = \['int8'\]"),
        (
            lambda m: m["modules"]["0"].update(in_features=2**70),
            r"\(in_features, out_features\) = \(1180591620717411303424",
        ),
    ],
)
def test_octavo_json(tmp_path, change, message):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    octavo.quantize_model(model, progress=False)
    octavo.save_quantized(model, tmp_path / "saved")
    path = tmp_path / "saved" / "octavo.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        octavo.load_quantized(tmp_path / "saved", torch.nn.Sequential(torch.nn.Linear(8, 8)))
