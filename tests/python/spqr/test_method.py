"""quantize_model by SpQR, GPTQ and round-to-nearest: order of the layers, their inputs, resuming, what is refused."""

import copy
import io
import json

import octavo
import pytest
import torch
from octavo.spqr import Hessian, SpQRConfig, factorize, quantize_weight
from octavo.spqr.engine.chain import find_chain
from torch import nn

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(1))


SEQUENTIAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantized(model, calibration, method="spqr", **options):
    model = copy.deepcopy(model)
    report = octavo.quantize_model(model, method, calibration=calibration, progress=False, simulate=True, **options)
    return model, report


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_every_layer_of_every_block(llama, ids):
    model, report = quantized(llama, ids)
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    assert [layer.name for layer in report.layers] == names
    assert report.skipped == {"lm_head": "as asked"}
    before, after = weights(llama), weights(model)
    assert {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])} == set(names)
    for layer in report.layers:
        assert 3.6 < layer.nominal_bits < layer.real_bits < 8
        assert 0 < layer.error < 0.25
        assert 0 < layer.outlier_share < 0.1
    with torch.no_grad():
        exact, found = llama(ids).logits, model(ids).logits
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.3
    assert not model.training and llama.config.use_cache == model.config.use_cache


def test_inputs_go_through_what_is_quantized_already(llama, ids):
    """By hand, for the first block and the first layers of the second, with whole forwards of the model."""
    model, _ = quantized(llama, ids, tau=0.1)
    by_hand = copy.deepcopy(llama)
    config = SpQRConfig(tau=0.1)
    groups = [
        ("self_attn", SEQUENTIAL[:3]),
        ("self_attn", SEQUENTIAL[3:4]),
        ("mlp", SEQUENTIAL[4:6]),
        ("mlp", ["down_proj"]),
    ]
    for block, (part, group) in [(0, each) for each in groups] + [(1, groups[0])]:
        layers = [by_hand.get_submodule(f"model.layers.{block}.{part}.{name}") for name in group]
        hessian = Hessian(layers[0].in_features)
        handle = layers[0].register_forward_pre_hook(lambda module, args, to=hessian: to.add(args[0]))
        with torch.no_grad():
            for sequence in ids:
                by_hand(sequence[None])
        handle.remove()
        factor = factorize(hessian.matrix, config.damping, config.act_order)
        for name, layer in zip(group, layers, strict=True):
            layer.weight.data = quantize_weight(layer.weight, factor, config).dequantize()
            same = model.get_submodule(f"model.layers.{block}.{part}.{name}").weight
            assert torch.equal(layer.weight, same), (block, name)


def test_packed_modules_stand_for_the_simulated_weights(llama, ids, tmp_path):
    dense, expected = quantized(llama, ids, outlier_fraction=0.01)
    model = copy.deepcopy(llama).train()
    report = octavo.quantize_model(model, "spqr", calibration=ids, progress=False, outlier_fraction=0.01)
    for layer, simulated in zip(report.layers, expected.layers, strict=True):
        module = model.get_submodule(layer.name)
        assert type(module) is octavo.nn.SpQRLinear and module.training
        assert torch.equal(module.packed_weight.dequantize(), dense.get_submodule(layer.name).weight)
        assert layer.real_bits == simulated.real_bits == module.real_bits
        assert layer.nominal_bits == simulated.nominal_bits == module.nominal_bits
        assert layer.bytes_after == layer.real_bits * module.in_features * module.out_features / 8
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    octavo.save_quantized(model, tmp_path / "model")
    loaded = octavo.load_quantized(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="group_size 128 has no packed form"):
        octavo.quantize_model(llama, "gptq", calibration=ids, group_size=128)


def test_order_of_methods(llama, ids):
    """Errors on the calibration data, the first block's: they are what each method minimizes."""

    def first(method, **options):
        layers = quantized(llama, ids, method, **options)[1].layers[:7]
        return sum(layer.error for layer in layers)

    rtn, gptq = first("rtn", bits=3), first("gptq", bits=3)
    spqr, more = first("spqr"), first("spqr", outlier_fraction=0.05)
    assert rtn > gptq > spqr > more
    assert first("spqr", bits=2) > spqr > first("spqr", bits=4)


def test_rtn_needs_no_data(llama, ids):
    without, report = quantized(llama, None, "rtn", bits=4, group_size=32)
    assert all(layer.error is None and layer.outlier_share == 0 for layer in report.layers)
    assert report.nominal_bits == 5.0
    assert_same_weights(without, quantized(llama, ids, "rtn", bits=4, group_size=32)[0])
    with pytest.raises(ValueError, match="method gptq needs calibration data"):
        octavo.quantize_model(llama, "gptq")


def test_share_of_outliers(llama, ids):
    _, report = quantized(llama, ids, outlier_fraction=0.02, bits=4)
    assert report.outlier_share == pytest.approx(0.02, rel=0.1)
    assert report.nominal_bits == pytest.approx(4 + 6 / 16 + 64 / 256 + 32 * report.outlier_share)
    assert report.real_bits > report.nominal_bits
    text = str(report)
    assert "spqr, 4 bits, groups of 16 x 16, two-level statistics, 2.00% outliers: 14 layers quantized" in text
    assert f"bits by formula {report.nominal_bits:.3f}, bits stored {report.real_bits:.3f}" in text
    assert json.loads(json.dumps(report.to_dict()))["nominal_bits"] == report.nominal_bits
    from rich.console import Console

    console = Console(record=True, width=160, file=io.StringIO())
    console.print(report)
    table = console.export_text()
    assert "output error" in table and f"{report.real_bits:.3f}" in table and "kept columns" not in table


# ---- other models --------------------------------------------------------------------------------------------------


def test_an_encoder_with_masks():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[2:, 7:] = 0
    ids = torch.randint(0, 50, (4, 12))
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    chain = find_chain(model, [module for module in model.modules() if type(module) is nn.Linear], batches[0])
    assert chain.name == "encoder.layer"
    changed, report = quantized(model, batches, group_size=16)
    assert len(report.layers) == 13  # the pooler too, though it is in no block
    assert not report.skipped
    with torch.no_grad():
        exact, found = (each(**batches[1]).last_hidden_state for each in (model, changed))
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.3


def test_layers_that_differ_in_their_arguments():
    """Blocks that get masks of their own (sliding windows, say) keep them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x, mask=None):
            return (x + self.layer(x * mask),)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x, mask=torch.ones(32).masked_fill(torch.arange(32) % 3 == i, 0.0))[0]
            return x

    torch.manual_seed(0)
    model, x = Model(), [torch.randn(40, 32) for _ in range(3)]
    chain = find_chain(model, [block.layer for block in model.blocks], x[0])
    assert (chain.name, chain.key, chain.shared) == ("blocks", 0, False)
    changed, _ = quantized(model, x)
    for i, block in enumerate(changed.blocks):
        unused = block.layer.weight.detach()[:, torch.arange(32) % 3 == i]
        assert float(unused.abs().max()) < 0.04  # what never sees an input is 0, or the code nearest to it


class Plain(nn.Module):
    """No list of blocks; a layer that is called twice; one that is never called; one in place."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Linear(64, 16)

    def forward(self, x):
        x = self.act(self.first(x))
        return self.last(self.twice(self.act(self.twice(x))))


def test_a_model_without_blocks():
    torch.manual_seed(0)
    x = [torch.randn(100, 32) for _ in range(4)]
    _, report = quantized(Plain(), x)
    assert [layer.name for layer in report.layers] == ["first", "twice", "last"]
    assert report.skipped == {"never": "no calibration input reached it"}
    assert all(layer.error < 0.2 for layer in report.layers)


def test_experts_that_only_some_batches_reach():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

        def forward(self, x):
            return x + self.experts[int(x[0, 0] > 0)](x)

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    x = [torch.randn(64, 32) for _ in range(6)]
    for i, batch in enumerate(x):
        batch[0, 0] = 5.0 if i % 2 else -5.0
    _, report = quantized(model, x)
    assert {layer.name for layer in report.layers} >= {"0.experts.0", "0.experts.1", "1.experts.0", "1.experts.1"}
    assert set(report.skipped) == {"0.experts.2", "1.experts.2"}


# ---- calibration data ----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words, as transformers calls it."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return transformers.BatchEncoding({"input_ids": [len(word) % 96 for word in text.split()]})


def test_a_text(llama, tmp_path):
    path = tmp_path / "text.txt"
    words = ["x" * (1 + i * i % 17) for i in range(320)]
    path.write_text(" ".join(words))
    rows = torch.tensor([len(word) for word in words]).view(10, 32)
    expected = quantized(llama, rows[torch.linspace(0, 9, 4).round().long()])[0]
    for given in (path, str(path)):
        assert_same_weights(quantized(llama, given, tokenizer=Words(), samples=4, context=32)[0], expected)
    with pytest.raises(ValueError, match="needs tokenizer=, the model's tokenizer"):
        quantized(llama, path)
    with pytest.raises(ValueError, match="the text has 320 tokens, fewer than one window of 400"):
        quantized(llama, path, tokenizer=Words(), context=400)
    with pytest.raises(FileNotFoundError):
        quantized(llama, tmp_path / "none.txt", tokenizer=Words())


def test_token_ids_in_any_form(llama, ids):
    expected = quantized(llama, list(ids[:4]))[0]
    for same in (ids[:4].tolist(), ids, [{"input_ids": row[None]} for row in ids], (row[None] for row in ids)):
        assert_same_weights(quantized(llama, same, samples=4)[0], expected)
    longer = torch.cat((ids, ids), 1)
    assert_same_weights(quantized(llama, longer, samples=4, context=32)[0], expected)
    for bad, options, message in (
        ([], {}, "calibration has no sequences"),
        ([ids[:, :0]], {}, "calibration batch 0 is empty"),
        (ids, {"context": 33}, "calibration sequence 0 has 32 tokens, fewer than context 33"),
        ([{"input_ids": None}], {}, "batch 0 holds no tensor"),
        (["text"], {}, "must be tensors or mappings, got str"),
        (ids, {"samples": 0}, "samples must be an integer, at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized(llama, bad, **options)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_bad_models_are_refused_before_anything_changes(llama, ids):
    model = copy.deepcopy(llama)
    before = copy.deepcopy(weights(model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.*1 of 8192 weights are NaN"):
        octavo.quantize_model(model, "spqr", calibration=ids, progress=False)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items() if "up_proj" not in n)
    odd = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 8))
    with pytest.raises(ValueError, match=r"group_size 16 does not divide the in_features of 0 \(40\), 1 \(40\): give"):
        quantized(odd, [torch.zeros(2, 40)])


def test_widths_that_groups_do_not_divide_are_left_and_named():
    odd = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 8))
    report = octavo.quantize_model(odd, "rtn", group_size=16, progress=False)
    assert [layer.name for layer in report.layers] == ["0"] and type(odd[1]) is nn.Linear
    assert report.skipped == {"1": "group_size 16 does not divide its in_features 40"}


def test_calibration_that_blows_up_is_named(llama, ids):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj: .* calibration inputs are NaN or Inf"):
        quantized(model, ids)
    zeros = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ValueError, match="0: the Hessian is 0: all calibration inputs of the layer are 0"):
        quantized(zeros, [torch.zeros(4, 32)])
    with pytest.raises(ValueError, match="0: the Hessian of 32 inputs is not positive definite with damping 0"):
        quantized(zeros, [torch.randn(4, 32)], "gptq", config=SpQRConfig.gptq(group_size=32, damping=0.0))


def test_a_flat_tensor_of_ids_is_one_sequence(llama):
    model = copy.deepcopy(llama)
    again = copy.deepcopy(llama)
    flat = torch.arange(48) % llama.config.vocab_size
    octavo.quantize_model(model, "spqr", calibration=flat, progress=False)
    octavo.quantize_model(again, "spqr", calibration=[flat[None]], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_options_of_another_method(llama, ids):
    for method, options, message in (
        ("int8", {"bits": 4}, "int8 has no setting bits"),
        ("int8", {"simulate": True}, "int8 has no setting simulate"),
        ("int8", {"samples": 4}, "int8 has no setting samples"),
        ("spqr", {"threshold": 0.0, "calibration": ids}, "spqr has no setting threshold"),
        ("spqr", {"samples": 1.5, "calibration": ids}, "samples must be an integer, at least 1, got 1.5"),
        ("spqr", {"context": "9", "calibration": ids}, "context must be an integer, at least 1, got '9'"),
        ("rtn", {"samples": 4}, "samples without calibration data"),
        ("spqr", {"keep_outliers": True, "calibration": ids}, "spqr has no setting keep_outliers"),
        ("spqr", {"tau": 0.1, "outlier_fraction": 0.1, "calibration": ids}, "tau or outlier_fraction, not both"),
        ("gptq", {"tau": 0.1, "calibration": ids}, "gptq has no setting tau"),
        ("spqr", {"config": SpQRConfig(), "bits": 3, "calibration": ids}, "config holds all settings: give bits in it"),
        ("spqr", {"config": {"bits": 3}, "calibration": ids}, "must be a SpQRConfig, got dict"),
        ("awq", {}, "unknown method 'awq'; known: int8, nf4, fp4, spqr, gptq, rtn"),
        ("spqr", {"bits": 3.0, "calibration": ids}, "bits must be an integer, got 3.0"),
        ("spqr", {"outlier_fraction": "a", "calibration": ids}, "outlier_fraction must be a number, got 'a'"),
        ("spqr", {"calibration": 5}, "calibration must be batches or the path of a text, got int"),
        ("spqr", {"calibration": ids, "context": 0}, "context must be an integer, at least 1, got 0"),
        ("spqr", {"calibration": [{"input_ids": ids[0]}], "context": 8}, "batch 0 is a mapping: cut it yourself"),
        ("spqr", {"calibration": [torch.tensor(3)]}, "calibration batch 0 is empty or a single number"),
    ):
        with pytest.raises(ValueError, match=message):
            octavo.quantize_model(llama, method, **options)


# ---- going on after an interruption --------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 8, 13])
def test_resuming_gives_what_one_run_gives(llama, ids, tmp_path, monkeypatch, after):
    from octavo.spqr.engine import blocks as pass_

    expected, report = quantized(llama, ids, outlier_fraction=0.01)
    real, calls = pass_.quantize_weight, []

    def counted(*args, **kwargs):
        if len(calls) == limit:
            raise Interrupted
        calls.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(pass_, "quantize_weight", counted)
    limit = after
    with pytest.raises(Interrupted):
        quantized(llama, ids, outlier_fraction=0.01, resume=tmp_path / "layers")
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) == after
    limit = None
    resumed, again = quantized(llama, ids, outlier_fraction=0.01, resume=tmp_path / "layers")
    assert len(calls) == len(set(calls)) == 14  # each layer once
    assert_same_weights(resumed, expected)
    assert again == report
    calls.clear()
    finished, _ = quantized(llama, ids, outlier_fraction=0.01, resume=tmp_path / "layers")
    assert calls == []
    assert_same_weights(finished, expected)


def test_a_directory_of_something_else(llama, ids, tmp_path):
    layers = tmp_path / "layers"
    quantized(llama, ids, "rtn", resume=layers)
    with pytest.raises(ValueError, match=r"different are its settings \(bits 4 is now 3\)"):
        quantized(llama, ids, "rtn", bits=3, resume=layers)
    with pytest.raises(ValueError, match="different are its calibration"):
        quantized(llama, ids[:3], "rtn", resume=layers)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="different are its weights"):
        quantized(other, ids, "rtn", resume=layers)
    file = next(layers.glob("*o_proj.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"o_proj.safetensors is damaged .*: remove it to quantize model.layers"):
        quantized(llama, ids, "rtn", resume=layers)
    (layers / "spqr-layers.json").write_text("{")
    with pytest.raises(ValueError, match=r"spqr-layers.json is damaged .*: remove .* to begin anew"):
        quantized(llama, ids, "rtn", resume=layers)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no spqr-layers\.json"):
        quantized(llama, ids, "rtn", resume=tmp_path / "taken")
