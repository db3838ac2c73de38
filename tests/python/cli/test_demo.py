"""`octavo demo` on a tiny model: every row, what is shown while it runs, and tables that are whole."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

pytest.importorskip("transformers")

from command import octavo_, refused
from octavo import models
from octavo.cli import demo
from octavo.core.progress import Bar
from octavo.models import evaluate
from octavo.models.gguf_reader import parsed_once
from rich.console import Console


def test_demo(monkeypatch, source, tmp_path):
    """All of it but the real model."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "smollm2", lambda: models.find_source(source))
    monkeypatch.setattr(demo, "CONTEXT", 128)
    result = octavo_("demo", "--out", tmp_path / "out", "--windows", 2, "--threads", 1)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [method.name for method in demo.contenders()]
    assert all(name in result.output for name in rows)
    assert rows["fp32"]["kl"] == 0.0
    assert rows["int8, threshold 6"]["kl"] > 0.0
    assert rows["bf16"]["layer_bytes"] * 2 == rows["fp32"]["layer_bytes"]
    assert rows["int8, threshold 6"]["layer_bytes"] < 0.3 * rows["fp32"]["layer_bytes"]
    assert (rows["fp32"]["real_bits"], rows["bf16"]["nominal_bits"]) == (32.0, 16.0)
    assert 8.0 == rows["int8, threshold 6"]["nominal_bits"] < rows["int8, threshold 6"]["real_bits"] < 9.0
    assert 3.625 < rows["SpQR, 3 bits"]["nominal_bits"] < rows["SpQR, 3 bits"]["real_bits"]
    assert rows["RTN, 3 bits"]["nominal_bits"] == 5.0
    assert rows["SpQR, 3 bits"]["layer_bytes"] < 0.2 * rows["fp32"]["layer_bytes"]
    assert all(row["perplexity"] > 1 and row["prefill"] > 0 and row["decode"] > 0 for row in rows.values())
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    full, small = record["optimizers"]
    assert small["name"] == "octavo AdamW8bit"
    assert small["state_bytes"] < 0.5 * full["state_bytes"]  # of so small a model, some tensors keep fp32 state
    assert full["step_s"] > 0 and small["step_s"] > 0
    phases = ["reading SmolLM2-135M-Instruct", "quantizing", "accuracy", "speed", "answers"]
    assert list(record["phases"]) == [*phases, "one training step, in turns"]
    said = [re.sub(r" \(\d+\)$", "", line) for line in result.stderr.splitlines()]
    assert said == [
        "octavo: reading SmolLM2-135M-Instruct", "octavo: reading weights",
        *(f"octavo: {phase}" for phase in [*record["phases"]][1:]),
    ]  # fmt: skip
    assert result.stdout.startswith("SmolLM2-135M-Instruct, 2 x 128 tokens")  # and no word of progress before it


def test_demo_quick_and_as_json(monkeypatch, source, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "smollm2", lambda: models.find_source(source))
    monkeypatch.setattr(demo, "CONTEXT", 128)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("not the demo's")
    command = ["demo", "--quick", "--json", "--quiet", "--out", tmp_path / "out"]
    result = octavo_(*command)
    assert result.exit_code == 0 and result.stderr == ""
    record = json.loads(result.stdout)
    assert [row["name"] for row in record["rows"]] == ["fp32", "int8, threshold 6", "NF4, blocks of 64"]
    assert record["optimizers"] == []
    refused(octavo_(*command), "out exists and holds demo.json; give --overwrite to replace it")
    assert octavo_(*command, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "mine.txt").exists()


def test_demo_shows_what_runs(monkeypatch, source):
    shown = []
    monkeypatch.setattr(Bar, "show", lambda self, *what: shown.append((self.what, *what)))
    reference = models.load_model(models.find_source(source))
    ids = torch.arange(64).reshape(2, 32)
    with demo._Phases(Console(file=io.StringIO(), force_terminal=True, width=80)) as phases:
        phases.begin("quantizing")
        candidates = [demo._make(method, reference, ids, phases) for method in demo.contenders()]
        expected = [("quantizing", f"SpQR, 3 bits: layer {n} of 14", n, 14) for n in (1, 7, 14)]
        assert set(expected) < set(shown)
        assert {("quantizing", method.name, 0, None) for method in demo.contenders()} < set(shown)
        shown.clear()
        phases.begin("speed", 2 * len(candidates))
        names = [method.name for method in demo.contenders()]
        evaluate.speed(candidates, ids[0], 2, 2, True, lambda n, i: phases.turn(f"round {n} of 2: {names[i]}"))
    turns = [f"round {n} of 2: {name}" for n in (1, 2) for name in names]
    assert shown == [("speed", turn, number, None) for number, turn in enumerate(turns)]
    assert "set_submodule" not in {name for model in candidates for name in vars(model)}
    assert list(phases.seconds) == ["quantizing", "speed"]


def test_a_gguf_file_is_parsed_once(monkeypatch, tmp_path):
    import gguf

    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for file in files:
        file.write_bytes(b"GGUF")
    parsed = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or object())
    before = gguf.GGUFReader
    with parsed_once():
        first = gguf.GGUFReader(files[0])
    with parsed_once():
        assert gguf.GGUFReader(files[0]) is first
        files[0].write_bytes(b"GGUF, changed")
        assert gguf.GGUFReader(files[0]) is not first
        assert gguf.GGUFReader(files[1]) is not first
    assert parsed == [str(files[0]), str(files[0]), str(files[1])]
    assert gguf.GGUFReader is before


def test_demo_progress_is_drawn_on_a_terminal_alone():
    drawn = {}
    for terminal in (True, False):
        file = io.StringIO()
        with demo._Phases(Console(file=file, force_terminal=terminal, width=80)) as phases:
            phases.begin("quantizing", 210)
            phases.show("SpQR, 3 bits: layer 57 of 210", 57)
        drawn[terminal] = file.getvalue()
    assert "quantizing SpQR, 3 bits: layer 57" in drawn[True]
    assert drawn[False] == "octavo: quantizing (210)\n"


def test_demo_tables_are_whole_in_80_columns():
    """As a pipe gets them, with the largest plausible numbers: nothing is cut, and no number is broken in two."""
    widest = ("NF4, double quantization", 32.0, 32.0, 26_428_800_000, 29_876_500_000, 98765.43, 12.3456, 98765.4, 987.6)
    other = ("SpQR, 3 bits", 4.2613, 4.1912, 2_640_000_000, 2_980_000_000, 1.5e12, 0.0931, 491.4, 25.44)
    rows = [demo.Row(*fields, "An answer of some length. " * 9, "a note of some length") for fields in (widest, other)]
    optimizers = [demo.OptimizerRow(name, 1_076_000_000_000, 98.765) for name in ("torch AdamW, fp32 state", "other")]
    versions = {"torch": "2.13.0+cu130"}
    machine = {"cpu": "A Processor With A Long Name (R) " * 2, "isa": "avx512", "threads": 128, "versions": versions}
    text = "10000 x 512 tokens of Python's language reference"
    record = {"model": "SmolLM2-135M-Instruct", "text": text, "layers": 210, "machine": machine}
    console = Console(file=io.StringIO(), width=80)
    demo._print(console, rows, record)
    demo._print_optimizers(console, optimizers, record)
    output = console.file.getvalue()
    assert "…" not in output
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    cells = {
        row.name: [line.split(row.name)[1].split() for line in lines if line.startswith((row.name, " " + row.name))]
        for row in rows
    }
    assert cells[widest[0]][:2] == [
        ["32.00", "32.00", "26429", "100%", "29876", "100%"],
        ["98765.43", "12.3456", "98765", "987.6"],
    ]
    assert cells[other[0]][:2] == [
        ["4.26", "4.19", "2640", "10%", "2980", "10%"],
        ["1.5e+12", "0.0931", "491", "25.4"],
    ]
    assert [line.split()[-3:] for line in lines if "torch AdamW" in line] == [["1076000", "100%", "98765"]]
    for heading in ("stored", "nominal", "perplexity", "/token", "prefill", "decode"):
        assert heading in output


def test_demo_texts_are_prose_and_disjoint():
    assert not set(demo._TEXT) & set(demo._CALIBRATION_TEXT)
    for topics in (demo._TEXT, demo._CALIBRATION_TEXT):
        paragraphs = demo.prose(topics).split("\n\n")
        assert sum(map(len, paragraphs)) > 8000
        assert all(paragraph[0].isalpha() and paragraph.endswith(".") for paragraph in paragraphs)
    assert not set(demo.prose(demo._TEXT).split("\n\n")) & set(demo.prose(demo._CALIBRATION_TEXT).split("\n\n"))
