"""`python -m octavo.bench.quality`: what is compared with what, on small models. No quality is asserted of noise."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from command import byte_tokenizer  # noqa: E402
from octavo import models, quantize_model  # noqa: E402
from octavo.bench import quality  # noqa: E402
from octavo.models import evaluate  # noqa: E402
from octavo.spqr import SpQRConfig  # noqa: E402
from rich.console import Console  # noqa: E402


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        bos_token_id=None,
        eos_token_id=257,
    )
    return transformers.LlamaForCausalLM(config).eval()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def put_on_grid(model):
    """As Q4_1 does: 16 levels between the ends of every 32 weights; powers of two, so that all of it is exact."""
    g = torch.Generator().manual_seed(0)
    for layer in linears(model).values():
        groups = layer.weight.data.view(-1, 32)
        codes = torch.randint(0, 16, groups.shape, generator=g).float()
        codes[:, 0], codes[:, 1] = 0, 15
        groups[:] = (codes - 8) * 2.0 ** torch.randint(-8, -4, (len(groups), 1), generator=g)


def test_the_row_that_a_grid_makes_exact_is_not_there():
    rows = quality.methods(16, 128)
    configs = {m: m.settings.get("config") for m in rows}
    settings = [(config.bits, config.group_size) for config in configs.values() if config is not None]
    assert (quality.GRID_BITS, quality.GRID_GROUP) not in settings
    assert {m.family for m in rows} == {"fp32", "NF4", "NF3", "FP4", "RTN", "GPTQ", "SpQR"}
    assert all(bool(m.samples) == (config is not None and config.propagate) for m, config in configs.items())
    model = llama()
    put_on_grid(model)
    before = {name: layer.weight.clone() for name, layer in linears(model).items()}
    config = SpQRConfig.rtn(quality.GRID_BITS, quality.GRID_GROUP)
    quantize_model(model, "rtn", config=config, simulate=True, progress=False)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in linears(model).items())


def test_off_grid_moves_every_layer_by_up_to_half_a_step():
    model = llama()
    put_on_grid(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quality.off_grid(model, seed=3)
    for name, layer in linears(model).items():
        exact = before[f"{name}.weight"].view(-1, 32)
        step = (exact.amax(1) - exact.amin(1)) / 15
        moved = (layer.weight.detach().view(-1, 32) - exact) / step[:, None]
        assert 0.49 < float(moved.abs().max()) <= 0.5001
        assert float(moved.std()) == pytest.approx(1 / math.sqrt(12), rel=0.03)
        del before[f"{name}.weight"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)
    again = llama()
    put_on_grid(again)
    quality.off_grid(again, seed=3)
    assert all(torch.equal(layer.weight, linears(again)[name].weight) for name, layer in linears(model).items())


def test_spread():
    windows = torch.arange(10)[:, None].expand(10, 4)
    assert quality.spread(windows, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert quality.spread_list(list(range(10)), 4) == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="has 10 windows of 4 tokens, 11 are wanted"):
        quality.spread(windows, 11)


@pytest.fixture
def texts(tmp_path):
    """Random bytes, one for calibration and one to judge by."""
    g = torch.Generator().manual_seed(0)
    for name in ("learn.txt", "judge.txt"):
        (tmp_path / name).write_text("".join(map(chr, torch.randint(97, 123, (600,), generator=g).tolist())))
    return tmp_path


def test_tables(texts, monkeypatch):
    llama().save_pretrained(texts / "model")
    byte_tokenizer().save_pretrained(texts / "model")
    monkeypatch.setattr(models, "smollm2", lambda: models.find_source(texts / "model"))
    monkeypatch.setattr(quality, "CONTEXT", 64)
    monkeypatch.setattr(quality, "Console", lambda **_: Console(file=io.StringIO(), width=160))
    given = ["--calibration", str(texts / "learn.txt"), "--text", str(texts / "judge.txt"), "--skip-tokens", "9"]
    given += ["--models", "plain", "dithered", "--samples", "2", "4", "--windows", "3", "--out", str(texts / "out")]
    quality.main([*given, "--simulate"])
    (path,) = (texts / "out").glob("quality-*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(path.read_text())
    rows = {(row["model"], row["method"], row["samples"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 2 * len(quality.methods(2, 4))
    assert "4-bit grid" in record["models"]["plain"]["note"]

    ids = torch.tensor(byte_tokenizer()((texts / "judge.txt").read_text()).input_ids)[9:]
    windows = evaluate.windows(ids, 64, 3)
    exact = models.load_model(models.find_source(texts / "model"), torch.float32)
    expected = evaluate.perplexity(exact, windows).perplexity
    assert rows["plain", "fp32", 0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert rows["plain", "fp32", 0]["divergence"] == rows["dithered", "fp32", 0]["divergence"] == 0.0
    assert rows["dithered", "fp32", 0]["perplexity"] != rows["plain", "fp32", 0]["perplexity"]
    assert all(row["divergence"] > 0 for key, row in rows.items() if key[1] != "fp32")
    assert rows["plain", "RTN-3 g16", 0]["nominal_bits"] == 5.0
    assert rows["plain", "SpQR-3 g16, no outliers", 2]["nominal_bits"] == 3.625
    assert rows["plain", "SpQR-3 g16", 2]["nominal_bits"] == pytest.approx(
        3.625 + 32 * rows["plain", "SpQR-3 g16", 2]["outlier_share"]
    )
    assert rows["plain", "SpQR-3 g16", 2]["divergence"] != rows["plain", "SpQR-3 g16", 4]["divergence"]
    rounded = models.load_model(models.find_source(texts / "model"), torch.float32)
    quantize_model(rounded, "rtn", bits=3, group_size=16, simulate=True, progress=False)
    score = evaluate.Score()
    for window in windows:
        score.add(evaluate.log_probabilities(rounded, window), window, evaluate.log_probabilities(exact, window))
    assert rows["plain", "RTN-3 g16", 0]["divergence"] == pytest.approx(score.kl, rel=1e-5)


def test_embeddings_are_of_all_tokens_and_unit_length():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (20, 7), generator=torch.Generator().manual_seed(0))
    vectors = quality.embed(model, ids)
    with torch.no_grad():
        mean = model(ids[17:18]).last_hidden_state[0].mean(0).double()
    torch.testing.assert_close(vectors[17], mean / mean.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "learn.txt"], "must be different texts"),
        (["--text", "judge.txt", "--models", "huge"], "knows plain, dithered and minilm, not huge"),
        (["--text", "judge.txt", "--methods", "AWQ"], "no row is called AWQ; there are fp32, NF4 b64"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--calibration", "learn.txt", *arguments])
    assert message in capsys.readouterr().err
