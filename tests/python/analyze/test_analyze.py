"""`octavo analyze`: numbers against direct computation and against outliers that were put there, and the command."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from command import TEXT, byte_tokenizer, octavo_, refused, tiny  # noqa: E402
from octavo import models  # noqa: E402
from octavo.analyze import activations, plots, weights  # noqa: E402
from octavo.analyze.sites import find_sites, split_name, watching  # noqa: E402
from octavo.models import evaluate  # noqa: E402

CONTEXT = 32


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (3, CONTEXT), generator=torch.Generator().manual_seed(1))


def inputs(model, ids, name):
    """What the layer `name` is given for each window, [windows * context, k]."""
    parts = []
    with watching([(lambda x: parts.append(x[0].clone()), model.get_submodule(name))]):
        for window in ids:
            evaluate.log_probabilities(model, window)
    return torch.cat(parts)


def watch(model, ids, threshold=6.0):
    return activations.watch(model, find_sites(model, ids[0]), ids, threshold, lambda score: None)


# ---- sites -----------------------------------------------------------------------------------------------------------


def test_layers_that_share_an_input_are_one_site(model, ids):
    sites = find_sites(model, ids[0])
    assert [(site.depth, site.projection, site.features) for site in sites[:4]] == [
        (0, "self_attn.q_proj, k_proj, v_proj", 64),
        (0, "self_attn.o_proj", 64),
        (0, "mlp.gate_proj, up_proj", 64),
        (0, "mlp.down_proj", 96),
    ]
    assert [site.depth for site in sites] == [0] * 4 + [1] * 4
    assert sum(len(site.linears) for site in sites) == 14  # not the head
    assert split_name("transformer.h.11.attn.dense") == (11, "attn.dense")
    assert plots.short(["a.q, k", "b.down"]) == {"a.q, k": "q, k", "b.down": "down"}
    assert plots.short(["a.dense", "b.dense"]) == {"a.dense": "a.dense", "b.dense": "b.dense"}


def test_a_model_without_linear_layers_is_refused(ids):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=258, n_positions=64)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no torch.nn.Linear but its head"):
        find_sites(transformers.GPT2LMHeadModel(config).eval(), ids[0])


# ---- activations -----------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_inputs(model, ids):
    seen = watch(model, ids, threshold=1.5)
    for layer in seen.layers:
        hit = inputs(model, ids, layer["names"][0]).abs() >= 1.5
        assert layer["positions"] == len(hit) == ids.numel()
        assert layer["dimensions_reaching"] == int(hit.any(0).sum())
        assert layer["dimensions_in_share_of_positions"] == int((hit.float().mean(0) >= 0.06).sum())
        assert layer["positions_share"] == pytest.approx(float(hit.any(1).float().mean()))
        assert layer["elements_share"] == pytest.approx(float(hit.float().mean()))
        assert layer["largest"] == float(inputs(model, ids, layer["names"][0]).abs().max())
    assert any(layer["elements_share"] > 0 for layer in seen.layers)
    mean = evaluate.perplexity(model, ids)
    assert seen.score.perplexity == pytest.approx(mean.perplexity, rel=1e-6)
    assert math.exp(sum(math.log(w["perplexity"]) for w in seen.windows) / 3) == pytest.approx(
        mean.perplexity, rel=1e-6
    )


def test_planted_outlier_features_are_found(model, ids):
    """One dimension of the hidden states reaches 6 in both layers, one in a single layer, one at single positions."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 50.0
        model.model.layers[0].post_attention_layernorm.weight[9] = 50.0
        model.model.embed_tokens.weight[7] = 0.0  # this token's hidden state is one dimension, 8 = sqrt(64) after norm
        model.model.embed_tokens.weight[7, 20] = 1.0
    ids = ids.clone()
    ids[ids == 7] = 8
    ids[0, 3] = 7
    seen = watch(model, ids)
    found = {entry["projection"]: entry for entry in seen.projections}
    qkv = {d["dimension"]: d for d in found["self_attn.q_proj, k_proj, v_proj"]["dimensions"]}
    assert qkv[5]["outlier_feature"] and qkv[5]["layers_share"] == 1.0 and qkv[5]["positions_share"] > 0.5
    assert max(abs(qkv[5]["low"]), qkv[5]["high"]) > 6.0
    assert not qkv[20]["outlier_feature"]
    assert qkv[20]["positions_share"] == pytest.approx(1 / ids.numel())  # in one position, whatever layers it is in
    up = {d["dimension"]: d for d in found["mlp.gate_proj, up_proj"]["dimensions"]}
    assert up[9]["outlier_feature"] and up[9]["layers_share"] == 0.5
    assert sum(d["outlier_feature"] for d in (*qkv.values(), *up.values())) == 2
    assert found["self_attn.o_proj"]["outlier_features"] == 0
    top = found["self_attn.q_proj, k_proj, v_proj"]["top"]
    column = top["dimensions"].index(5)
    for depth in (0, 1):
        x = inputs(model, ids, f"model.layers.{depth}.self_attn.q_proj")
        assert top["positions_share"][depth][column] == pytest.approx(float((x[:, 5].abs() >= 6).float().mean()))
    assert seen.windows[1]["outlier_features"]["self_attn.q_proj, k_proj, v_proj"] == 1


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_hessians_are_those_of_the_inputs(model, ids, monkeypatch):
    sites = find_sites(model, ids[0])
    monkeypatch.setattr(weights, "_MEMORY", 4 * (64**2 + 96**2))  # two to three sites a pass
    assert [len(part) for part in weights.passes(sites)] == [3, 2, 2, 1]
    windows = []
    for site, hessian in weights.hessians(model, sites, ids, lambda: windows.append(0)):
        x = inputs(model, ids, next(iter(site.linears))).double()
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert len(windows) == 4 * len(ids)


def correlated(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, k, generator=g) @ torch.randn(k, k, generator=g)
    return torch.randn(n, k, generator=g), x, x.T @ x / len(x)


def test_sensitivity_is_the_cost_of_one_rounded_weight():
    """s = min over the other weights of the row of the squared output error per token, halved."""
    w, x, _ = correlated(4, 12)
    inverse = weights.invert(x.double().T @ x.double() / len(x), damping=0.0)
    s = weights.sensitivity(w.double(), inverse, bits=3, group_size=5)
    rounded = weights.round_groups(w.double(), 3, 5)
    for i, j in ((0, 0), (2, 7), (3, 11)):
        error = (w[i, j] - rounded[i, j]).double() * x[:, j].double()
        others = x[:, [c for c in range(12) if c != j]].double()
        residual = error - others @ torch.linalg.lstsq(others, error[:, None]).solution[:, 0]
        assert float(s[i, j]) == pytest.approx(float(residual.square().mean()) / 2, rel=1e-6)


def test_rounding_of_groups():
    w, _, _ = correlated(6, 37)
    rounded = weights.round_groups(w, 3, 16)
    for begin in (0, 16, 32):
        part, exact = rounded[:, begin : begin + 16], w[:, begin : begin + 16]
        assert all(len(row.unique()) <= 8 for row in part)
        assert torch.equal(part.amin(1), exact.amin(1))
        step = (exact.amax(1) - exact.amin(1)) / 7
        assert bool(((part - exact).abs() <= step[:, None] * 0.5001).all())


@pytest.mark.parametrize("group_size", [16, 48, 300])
def test_gptq_column_by_column(group_size):
    """The blocked form against the plain one, which updates the whole rest after every column, in float64."""
    w, _, h = correlated(5, 300)
    inverse = weights.invert(h.double())
    rounded, cost = weights.gptq(w.double(), inverse, 3, group_size)
    rest, left, expected = w.double().clone(), inverse.clone(), torch.empty(5, 300, dtype=torch.float64)
    total = torch.zeros(5, 300, dtype=torch.float64)
    for j in range(300):
        if j % group_size == 0:
            part = rest[:, j : j + group_size]
            low, step = part.amin(1), (part.amax(1) - part.amin(1)) / 7
        expected[:, j] = ((rest[:, j] - low) / step).round().clamp(0, 7) * step + low
        error = rest[:, j] - expected[:, j]
        total[:, j] = error.square() / (2 * left[j, j])
        rest -= torch.outer(error / left[j, j], left[j])
        left = left - torch.outer(left[:, j], left[j]) / left[j, j]
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cost, total, rtol=1e-5, atol=1e-12)
    damped = torch.linalg.inv(inverse)
    error = w.double() - rounded
    assert float(cost.sum()) == pytest.approx(float(((error @ damped) * error).sum()) / 2, rel=1e-6)
    plain = weights.relative_error(w.double(), weights.round_groups(w.double(), 3, group_size), damped)
    assert weights.relative_error(w.double(), rounded, damped) < plain


def test_structure_of_planted_outliers():
    outliers = torch.rand(192, 256, generator=torch.Generator().manual_seed(0)) < 0.002
    alone = weights.structure(outliers)
    assert alone["shares"] == {"rows": 0.0, "columns": 0.0, "unstructured": 1.0}
    assert alone["lines"] == {"rows": [], "columns": []}
    scattered = int(outliers.sum())
    outliers[17, ::4] = True  # 64 of a row
    outliers[::3, 40] = outliers[::3, 200] = True  # 64 of each column
    outliers[64:128, 100:110:3] = True  # of the second of three heads, too thin for any of its rows or columns
    found = weights.structure(outliers, weights.Heads(64, rows=True, rotary=False))
    assert found["lines"]["rows"] == [17]
    assert found["lines"]["columns"][:1] == [40] and found["lines"]["columns"][-1] == 200
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert found["shares"]["rows"] == pytest.approx(int(outliers[17].sum()) / int(outliers.sum()))
    assert found["shares"]["unstructured"] <= scattered / int(outliers.sum())


def test_heads_and_rotary_frequencies_are_told_apart():
    base = torch.rand(192, 256, generator=torch.Generator().manual_seed(0)) < 0.004
    more = torch.rand(192, 256, generator=torch.Generator().manual_seed(1)) < 0.02
    in_head, in_frequency = torch.zeros(192, 256, dtype=torch.bool), torch.zeros(192, 256, dtype=torch.bool)
    in_head[64:128] = True
    in_frequency[3::32] = True  # frequency 3: rows 3 and 35 of every head of 64
    heads = weights.Heads(64, rows=True, rotary=True)
    found = weights.structure(base | (more & in_head), heads)
    assert (found["lines"]["heads"], found["lines"]["rotary"]) == ([1], [])
    assert found["shares"]["heads"] > 0.5
    found = weights.structure(base | (more & in_frequency), heads)
    assert (found["lines"]["heads"], found["lines"]["rotary"]) == ([], [3])
    columns = weights.structure((base | (more & in_head)).T, weights.Heads(64, rows=False, rotary=False))
    assert columns["lines"]["heads"] == [1]


def test_heads_of_a_model(model):
    def heads(name):
        return weights.find_heads(model.config, name, model.get_submodule(name).weight.shape)

    assert heads("model.layers.0.self_attn.q_proj") == weights.Heads(16, rows=True, rotary=True)
    assert heads("model.layers.0.self_attn.v_proj") == weights.Heads(16, rows=True, rotary=False)
    assert heads("model.layers.0.self_attn.o_proj") == weights.Heads(16, rows=False, rotary=False)
    assert heads("model.layers.0.mlp.up_proj") is None
    assert weights.find_heads(types.SimpleNamespace(), "a.attn.q_proj", torch.Size((4, 4))) is None


def test_share_of_the_model():
    g = torch.Generator().manual_seed(0)
    values = [torch.rand(5000, generator=g), 10 * torch.rand(15000, generator=g)]
    low, high, bins = weights._LOG
    shares = weights.shares_of_model([torch.histc(v.log10(), bins, low, high) for v in values], 0.1)
    cut = torch.cat(values).sort().values[-2000]
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(float((values[1] >= cut).float().mean()), rel=0.05)
    assert int(weights.top(values[0], 0.01).sum()) == 50
    assert int(weights.top(torch.zeros(100), 0.1).sum()) == 0


def test_a_weight_is_described_by_its_own_numbers(model, ids):
    site = find_sites(model, ids[0])[3]
    (hessian,) = [h for s, h in weights.hessians(model, [site], ids, lambda: None)]
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        site.linears[name].weight[11] *= 100.0
    settings = weights.Settings(order="identity", share=0.02)
    entry, _ = weights.examine(model.config, name, site, hessian, settings, mapped=True)
    w = site.linears[name].weight.detach()
    s = weights.sensitivity(w, weights.invert(hessian), 3, 16)
    assert (entry["projection"], entry["depth"], entry["shape"]) == ("mlp.down_proj", 0, [64, 96])
    assert entry["lines"]["rows"] == [11] and entry["shares"]["rows"] > 0.6
    assert entry["mean_sensitivity"] == pytest.approx(float(s.mean()), rel=1e-5)
    assert sum(entry["outliers_of_row"]) == sum(entry["outliers_of_column"]) == round(0.02 * w.numel())
    assert entry["share_of_sensitivity"] == pytest.approx(float(s.flatten().topk(123).values.sum() / s.sum()), rel=1e-4)
    along = entry["along_order"]
    assert along["sensitivity"] == pytest.approx(s.mean(0).reshape(32, 3).mean(1).tolist(), rel=1e-4)
    assert len(along["cost"]) == 32 and sum(along["outliers"]) / 32 == pytest.approx(0.02, rel=0.01)
    assert 0 < entry["error_gptq"] < entry["error_rounding"] < 1
    cells = entry["map"]["log10_over_mean"]
    assert (len(cells), len(cells[0])) == (64, 96)
    assert cells[11][5] == pytest.approx(max(-6.0, math.log10(max(1e-30, float(s[11, 5] / s.mean())))), abs=0.006)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(source, tmp_path, text):
    out = tmp_path / "out"
    arguments = ("--text", text, "--context", CONTEXT, "--threads", 1)
    result = octavo_("analyze", source, *arguments, "--windows", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "outlier features" in result.output and "down_proj" in result.output
    record = json.loads((out / "analyze.json").read_text())
    exact = models.load_model(models.find_source(source))
    expected = evaluate.perplexity(exact, evaluate.windows(byte_tokenizer()(TEXT).input_ids, CONTEXT, 2))
    assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert len(record["weights"]["layers"]) == 14
    assert all("map" in layer for layer in record["weights"]["layers"])
    for name in ("activations.png", "weights.png", "maps.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    plots.weights(record, tmp_path / "again.png")  # the record is enough to draw from
    assert (tmp_path / "again.png").stat().st_size > 10000

    more = ("--beside", out, "--order", "identity", "--group-size", 24, "--threshold", 1.0)
    result = octavo_("analyze", source, *arguments, "--windows", 1, "--out", tmp_path / "two", *more)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "two" / "analyze.json").read_text())
    settings = {"bits": 3, "group_size": 24, "share": 0.01, "order": "identity", "damping": weights.DAMPING}
    assert record["weights"]["settings"] == settings


def test_command_refuses(source, tmp_path, text):
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "other.json").write_text("[1]")
    out = tmp_path / "out"

    def run(*arguments):
        return octavo_("analyze", *arguments, "--out", out)

    refused(run(source, "--text", tmp_path / "nowhere.txt"), "nowhere.txt")
    refused(run(source, "--text", tmp_path / "short.txt"), "short.txt: the text has 9 tokens", "a longer text")
    refused(run(source, "--text", text, "--beside", tmp_path / "other.json"), "other.json is no analyze.json")
    refused(run(source, "--text", text, "--beside", tmp_path / "none.json"), "none.json")
    refused(run("nowhere", "--text", text), "nowhere does not exist; give", "OWNER/NAME or smollm2")
    refused(run(tmp_path, "--text", text), "holds no model")
    assert run(source, "--text", text, "--order", "random").exit_code == 2
    assert run(source).exit_code == 2
    assert not out.exists()


def test_models_of_the_hub(monkeypatch, source):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "no/body":
            raise OSError("404: there is no no/body\nmore")
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.resolve("some/body") == models.find_source(source)
    with pytest.raises(models.ModelError, match=r"no/body is no path, and the hub does not give it: 404: there is no"):
        models.resolve("no/body")
    for name in ("../missing", "/missing/model", "a/b/c", "missing"):
        with pytest.raises(models.ModelError, match="does not exist; give"):
            models.resolve(name)
    assert asked == ["some/body", "no/body"]


def test_an_octavo_model_is_refused(source, tmp_path, text):
    assert octavo_("quantize", source, tmp_path / "int8").exit_code == 0
    result = octavo_("analyze", tmp_path / "int8", "--text", text, "--context", CONTEXT, "--out", tmp_path / "out")
    refused(result, "its layers are Int8Linear: give the model that it was made from")
