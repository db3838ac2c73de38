"""The bench of SwitchBack: what is compared with what, and that a step is a whole one. No times are asserted."""

from __future__ import annotations

import json
from pathlib import Path

import octavo.bench
import pytest
import torch
from octavo import int8
from octavo.bench import cases, common, limits, switchback
from octavo.nn import SwitchBackLinear
from rich.console import Console
from torch import nn

EFFORT = common.Effort(0.0, 0.0, 1, 1)
LIMIT = limits.Limits(1, "portable", read=1e9, read_median=1e9, peaks={"int8": 1e12})


def test_rows_of_a_training_step():
    rows, share = switchback.bench_step(16, 40, 24, EFFORT, LIMIT, "cpu")
    assert [row.method for row in rows] == ["torch bf16", *(f"octavo {variant}" for variant in switchback.VARIANTS)]
    by_name = {row.method: row for row in rows}
    assert by_name["octavo switchback"].versus == "torch bf16"
    assert by_name["octavo all_int8"].versus == "octavo switchback" and by_name["torch bf16"].ratio is None
    assert all(row.ops == 6 * 16 * 40 * 24 for row in rows)
    assert by_name["torch bf16"].limit_share is None
    for name, products in (("octavo switchback", 2), ("octavo all_int8", 3)):
        row = by_name[name]
        assert row.limit_share == pytest.approx(products * 2 * 16 * 40 * 24 / 1e12 / row.median_s)
        assert 1e-3 < row.error < 0.05
    assert "of octavo switchback's time" in share


def test_a_step_quantizes_the_weight_anew_and_has_all_gradients(monkeypatch: pytest.MonkeyPatch):
    layer = SwitchBackLinear(24, 40, False, dtype=torch.bfloat16)
    x = torch.randn(16, 24, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(16, 40, dtype=torch.bfloat16)
    plain = nn.Linear(24, 40, False, dtype=torch.bfloat16)
    plain.weight = layer.weight
    switchback.training_step(plain, x, grad)
    want = x.grad, layer.weight.grad
    calls = []
    original = int8.ops.quantize_tensorwise_transpose
    monkeypatch.setattr(int8.ops, "quantize_tensorwise_transpose", lambda x: calls.append(x) or original(x))
    for _ in range(2):
        switchback.training_step(layer, x, grad)
    assert len(calls) == 2
    for got, exact in zip((x.grad, layer.weight.grad), want, strict=True):
        assert common.relative_error(got, exact) < 0.05


def test_rows_of_the_transpose():
    rows = switchback.bench_transpose(33, 24, EFFORT, LIMIT, "cpu")
    assert len(rows) == 4 and {row.dtype for row in rows} == {"fp32", "bf16"}
    assert rows[0].bytes == 33 * 24 * 10 and rows[2].bytes == 33 * 24 * 6
    assert rows[1].versus == rows[0].method


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cases, "SWITCHBACK_LAYERS", ((40, 24),))
    monkeypatch.setattr(cases, "SWITCHBACK_QUICK_ROWS", (16,))
    monkeypatch.setattr(common, "QUICK", EFFORT)
    monkeypatch.setattr(limits, "measure", lambda threads, device: LIMIT)
    console = Console(record=True, width=200)
    record = switchback.run(console, quick=True, out=tmp_path, threads=[1])
    text = console.export_text()
    assert "octavo memory_efficient" in text and "quantization: " in text
    (path,) = tmp_path.glob("switchback-*.json")
    assert len(json.loads(path.read_text())["rows"]) == len(record.rows) == 9
    assert "switchback" in octavo.bench.FAMILIES
