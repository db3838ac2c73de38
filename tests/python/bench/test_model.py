"""The bench of whole models: what its contenders share, what is counted, what is written. No times are asserted."""

from __future__ import annotations

import functools
import io
import json
import sys

import pytest
import torch
from bench_settings import limits_of, setting
from octavo.bench import cases, common, limits
from octavo.bench import int8 as family
from octavo.bench import model as models
from octavo.models import evaluate
from octavo.nn import Int8Linear
from rich.console import Console

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
WORK = models.Work(prefill=24, prompt=8, decode=4)


@pytest.fixture
def subject():
    pytest.importorskip("transformers")
    return models.random_llama("cpu", TINY)


def test_contenders_share_what_they_do_not_replace(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    skipped = {}
    with torch.inference_mode():
        networks = models.prepare(subject, skipped)
    assert list(networks) == ["torch bf16", "octavo t=0", "octavo t=6"]
    assert "bitsandbytes" in skipped["bitsandbytes t=6"]
    layers = {name: [each for each in n.modules() if isinstance(each, Int8Linear)] for name, n in networks.items()}
    assert {name: len(found) for name, found in layers.items()} == {"torch bf16": 0, "octavo t=0": 14, "octavo t=6": 14}
    assert [layers[name][0].threshold for name in ("octavo t=0", "octavo t=6")] == [0.0, 6.0]
    for network in networks.values():
        assert network.lm_head.weight is subject.network.lm_head.weight
        assert network.model.norm.weight is subject.network.model.norm.weight
    assert type(subject.network.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_outlier_columns_are_where_they_are_promised(subject):
    seen = {}

    def watch(name, module, args):
        seen.setdefault(name.rpartition(".")[2], set()).add(int((args[0].abs() >= family.THRESHOLD).any(1).sum()))

    for name, module in subject.network.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(functools.partial(watch, name))
    models.prefill(subject.network, subject.ids)()
    wide = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert {seen[name].pop() for name in wide} == {cases.OUTLIER_COLUMNS}
    assert seen["o_proj"] == seen["down_proj"] == {0}


def test_decoding_is_greedy_and_repeats(subject):
    with torch.inference_mode():
        call = models.decode(subject.network, subject.ids[:8], 4)
        chosen = call().tolist()
        assert call().tolist() == chosen
    *_, expected = evaluate.generate(subject.network, subject.ids[:8], 5)
    assert chosen == expected[1:]  # the first comes from the prompt, before the clock starts


def test_rows_of_a_model(subject):
    with torch.inference_mode():
        networks = {name: network for name, network in models.prepare(subject, {}).items() if "bits" not in name}
        prefill, decode = models.bench("tiny", subject, networks, WORK, setting([]))
    assert [row.method for row in prefill] == [row.method for row in decode] == list(networks)
    reference, *quantized = prefill
    assert reference.parameters == subject.parameters
    assert reference.weight_bytes == evaluate.model_bytes(subject.network)
    assert reference.error is None
    assert reference.versus == "octavo t=6"
    assert "tiny" in reference.case and "24 tokens, threads=1" in reference.case
    assert "4 tokens after 8" in decode[0].case
    assert decode[0].bytes == 4 * (reference.weight_bytes - subject.network.model.embed_tokens.weight.nbytes)
    for row in quantized:
        assert row.weight_bytes < reference.weight_bytes
        assert 0 < row.error < 0.1
    for row in (*prefill, *decode):
        assert row.tokens_per_s == pytest.approx(row.shape[0] / row.median_s)


def test_a_run_prints_and_writes_every_row(subject, monkeypatch, tmp_path):
    def missing(_):
        raise models.models.ModelError("not installed")

    monkeypatch.setattr(models, "SUBJECTS", {"tiny": lambda _: subject, "absent": missing})
    monkeypatch.setattr(models, "FULL", WORK)
    monkeypatch.setattr(common, "FULL", setting([]).effort)
    monkeypatch.setattr(limits, "measure", lambda threads, _: limits_of(read=1e9, int8=1e9, fma=1e9))
    console = Console(width=200, record=True, file=io.StringIO())
    before = torch.get_num_threads()
    models.run(console, out=tmp_path, threads=[1, 2])
    assert torch.get_num_threads() == before
    text = console.export_text()
    assert "decode of 4 tokens after 8, threads=2" in text
    assert "skipped: absent: not installed" in text
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert data["family"] == "model"
    assert {row["threads"] for row in data["rows"]} == {1, 2}
    assert {"model", "parameters", "prompt", "tokens_per_s", "weight_bytes", "ratio"} <= set(data["rows"][0])
