"""PEFT beside octavo: its LoRA on octavo's layers, its adapters read by octavo, octavo's read by it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import octavo  # noqa: E402
from lora_layers import dense  # noqa: E402
from octavo.core.low_bit import LowBitLinear  # noqa: E402
from octavo.core.method import stored_methods  # noqa: E402
from octavo.integrations.peft import OctavoLoraLinear, register  # noqa: E402
from octavo.nn import LoRALinear  # noqa: E402
from torch import nn  # noqa: E402

IDS = torch.arange(24).reshape(2, 12)
Q = "model.layers.0.self_attn.q_proj"


def llama(kind: str = "int8", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    if kind == "spqr":
        octavo.quantize_model(model, "rtn", progress=False, bits=4, group_size=32)
    elif kind != "linear":
        octavo.quantize_model(model, kind, progress=False)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def lora(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)  # init_lora_weights=False: B is not 0


@pytest.fixture(params=stored_methods())
def kind(request):
    return request.param


# ---- PEFT's LoRA on octavo's layers --------------------------------------------------------------------------------


def test_peft_adapts_octavo_layers(kind):
    base = llama(kind)
    model = peft.get_peft_model(copy.deepcopy(base), register(lora(), base))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OctavoLoraLinear)}
    assert len(layers) == 14
    assert all(isinstance(layer.base_layer, LowBitLinear) for layer in layers.values())
    layer = layers[f"base_model.model.{Q}"]
    x = torch.randn(5, 64)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = layer.base_layer(x) + 2.0 * x @ a.t() @ b.t()
    torch.testing.assert_close(layer.eval()(x).detach(), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert not torch.allclose(logits(model), logits(base))
    assert {name.rpartition(".lora_")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "A.default.weight",
        "B.default.weight",
    }


def test_peft_trains(kind):
    base = llama(kind)
    model = peft.get_peft_model(base, register(lora(init_lora_weights=True, lora_dropout=0.1), base)).train()
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)


def test_peft_merges_exactly_and_unmerges_to_the_bit(kind):
    base = llama(kind, torch.bfloat16)  # without biases: the model says in which dtype it computes
    model = peft.get_peft_model(base, register(lora(), base))
    layer = model.get_submodule(f"base_model.model.{Q}")
    y, unmerged = logits(model), layer.base_layer
    a, b = layer.lora_A["default"].weight.detach().float(), layer.lora_B["default"].weight.detach().float()
    expected = (dense(unmerged) + (b @ a) * 2.0).bfloat16()
    model.merge_adapter()
    assert type(layer.base_layer) is nn.Linear
    assert torch.equal(layer.base_layer.weight, expected)
    merged = logits(model)
    assert float((merged - y).float().norm()) < 0.1 * float(y.float().norm())
    model.merge_adapter()  # once more is nothing more
    assert torch.equal(layer.base_layer.weight, expected)
    model.unmerge_adapter()
    assert layer.base_layer is unmerged
    assert torch.equal(logits(model), y)
    plain = model.merge_and_unload()
    assert type(plain.get_submodule(Q)) is nn.Linear
    assert torch.equal(plain.get_submodule(Q).weight, expected)
    assert torch.equal(logits(plain), merged)


def test_peft_merges_several():
    base = llama()
    config = register(lora(), base)
    model = peft.get_peft_model(base, config)
    model.add_adapter("second", register(lora(r=2), model))
    assert sorted(model.peft_config["second"].target_modules) == sorted(model.peft_config["default"].target_modules)
    layer = model.get_submodule(f"base_model.model.{Q}")
    deltas = {
        name: (layer.lora_B[name].weight @ layer.lora_A[name].weight).detach() * layer.scaling[name]
        for name in ("default", "second")
    }
    weight = dense(layer.base_layer)
    model.merge_adapter(["default"])
    torch.testing.assert_close(layer.base_layer.weight, weight + deltas["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(layer.base_layer.weight, weight + deltas["default"] + deltas["second"])
    model.unmerge_adapter()
    assert torch.equal(dense(layer.base_layer), weight)
    layer.lora_B["second"].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="adapter 'second': 64 of 4096 merged weights are NaN or Inf"):
        layer.merge(adapter_names=["second"])
    assert not layer.merged and torch.equal(dense(layer.base_layer), weight)


def test_peft_switches_and_reloads(kind, tmp_path):
    base = llama(kind)
    model = peft.get_peft_model(copy.deepcopy(base), register(lora(), base), adapter_name="first")
    model.add_adapter("second", register(lora(r=2), base))
    with_a = logits(model)
    model.set_adapter("second")
    with_b = logits(model)
    assert not torch.allclose(with_a, with_b)
    model.set_adapter("first")
    assert torch.equal(logits(model), with_a)
    model.save_pretrained(tmp_path)
    config = register(peft.LoraConfig.from_pretrained(tmp_path / "first"), base)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", config=config)
    assert torch.equal(logits(again), with_a)
    both = copy.deepcopy(base)
    octavo.load_adapter(both, tmp_path / "first")
    octavo.load_adapter(both, tmp_path / "second")
    torch.testing.assert_close(logits(both), with_b, rtol=1e-5, atol=1e-5)
    octavo.set_adapter(both, "first")
    torch.testing.assert_close(logits(both), with_a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=str,
)
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_what_pefts_lora_has(base, options):
    """It trains, merges to what it computed, and unmerges to the bit."""
    model = peft.get_peft_model(llama(base), lora(**options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    y = logits(model.eval())
    model.merge_adapter()
    assert float((logits(model) - y).norm() / y.norm()) < (0.05 if base == "int8" else 1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_changes_the_base_quantizes_it_again(init):
    base = llama("nf4")
    y, before = logits(base), dense(base.get_submodule(Q))
    model = peft.get_peft_model(base, lora(init_lora_weights=init))
    layer = model.get_submodule(f"base_model.model.{Q}")
    assert type(layer.base_layer).__name__ == "NF4Linear" and not torch.equal(dense(layer.base_layer), before)
    summed = dense(layer.base_layer) + layer.get_delta_weight("default")
    assert float((summed - before).norm() / before.norm()) < 0.15
    assert float((logits(model) - y).norm() / y.norm()) < 0.3
    with pytest.raises(ValueError, match="cannot be quantized again without calibration data"):
        peft.get_peft_model(llama("spqr"), lora(init_lora_weights=init))


OTHERS = {
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules="all-linear", total_step=10),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules="all-linear", oft_block_size=16),
    "boft": lambda: peft.BOFTConfig(target_modules="all-linear", boft_block_size=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_train_and_their_merging_is_refused(kind, name):
    model = peft.get_peft_model(llama(kind), OTHERS[name]())
    y = logits(model.eval())
    model.train()(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    model.eval()
    with pytest.raises(RuntimeError, match=r"Linear\.weight is read from quantized codes, what is written to it would"):
        model.merge_adapter()
    assert torch.equal(logits(model), y)


def test_peft_needs_nothing_to_be_registered(tmp_path):
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj"], fan_in_fan_out=True))
    assert type(model.get_submodule(f"base_model.model.{Q}")).__name__ == "OctavoLoraLinear"
    everywhere = peft.get_peft_model(llama("nf4"), peft.LoraConfig(target_modules="all-linear"))
    assert len(everywhere.targeted_module_names) == 14
    everywhere.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama("nf4"), tmp_path)
    assert torch.equal(logits(again), logits(everywhere))
    inside = llama("nf4")
    inside.load_adapter(str(tmp_path))
    assert torch.equal(logits(inside), logits(everywhere))


def test_preparation_for_training_switches_checkpointing_on():
    for model in (llama("nf4"), llama("int8")):
        assert peft.prepare_model_for_kbit_training(model).is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        off = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert not off.is_gradient_checkpointing


def test_another_version_of_peft_is_left_alone(monkeypatch):
    from octavo.integrations.peft import connect

    before = peft.tuners.lora.LoraModel._create_new_module
    monkeypatch.setattr(peft, "__version__", "9.1.0")
    with pytest.warns(UserWarning, match=r"tried with PEFT 0\.18 to 0\.21 and leaves 9\.1\.0 as it is"):
        connect(peft)
    assert peft.tuners.lora.LoraModel._create_new_module is before


# ---- files, both ways ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*layers\.1\..*_proj", "exclude_modules": ["k_proj"]},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 3}},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_octavo_reads_what_peft_writes(options, tmp_path):
    """On a plain base: PEFT's own layers."""
    base = llama("linear")
    model = peft.get_peft_model(copy.deepcopy(base), lora(**options))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert octavo.load_adapter(base, tmp_path, "theirs") == "theirs"
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    adapted = {name for name, m in base.named_modules() if isinstance(m, LoRALinear)}
    theirs = {name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == {name.removeprefix("base_model.model.") for name in theirs}


def test_octavo_reads_what_peft_writes_on_octavo_layers(kind, tmp_path):
    base = llama(kind)
    model = peft.get_peft_model(copy.deepcopy(base), register(lora(), base))
    model.save_pretrained(tmp_path)
    octavo.load_adapter(base, tmp_path, "theirs")
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("include", [None, ["q_proj", "model.layers.1.mlp.up_proj"]], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_octavo_writes(kind, include, rslora, tmp_path):
    base = llama(kind)
    model = copy.deepcopy(base)
    names = octavo.add_lora(model, 4, 6, include=include, use_rslora=rslora)
    for name in names:
        model.get_submodule(name).lora_B["default"].data.normal_(std=0.1)
    if include is None:  # another rank in one layer
        layer = model.get_submodule(Q)
        octavo.nn.LoRALinear.delete_adapter(layer, "default")
        layer.add_adapter("default", 2, 5, use_rslora=rslora)
        layer.lora_B["default"].data.normal_(std=0.1)
        layer.set_adapter("default")
    octavo.save_adapter(model, tmp_path / "ours")
    config = register(peft.LoraConfig.from_pretrained(tmp_path / "ours"), base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", config=config)
    assert {name for name, m in theirs.named_modules() if isinstance(m, OctavoLoraLinear)} == {
        f"base_model.model.{name}" for name in names
    }
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(base))


def test_peft_reads_ours_on_a_plain_base(tmp_path):
    """Trained on a quantized base, used by PEFT alone, which is told nothing of octavo."""
    model = llama()
    for name in octavo.add_lora(model, 4, 8):
        model.get_submodule(name).lora_B["default"].data.normal_(std=0.1)
    octavo.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama("linear"), tmp_path / "ours")
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    plain = llama("linear")
    octavo.load_adapter(plain, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True, which octavo does not compute"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which also changes the base's weights"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\], which octavo does not"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens\.lora_embedding_A \[4, 128\]"),
    ],
    ids=str,
)
def test_octavo_refuses_what_it_does_not_compute(options, message, tmp_path):
    model = peft.get_peft_model(llama("linear"), lora(**options))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = llama()
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        octavo.load_adapter(base, tmp_path, "x")
    assert {name: id(module) for name, module in base.named_modules()} == before


def test_other_adapters_of_peft_are_refused(tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(llama("linear"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'IA3'; octavo reads 'LORA'"):
        octavo.load_adapter(llama(), tmp_path)


def test_every_option_of_the_installed_peft_is_known(tmp_path):
    """A plain adapter of this PEFT holds nothing that octavo would refuse."""
    peft.get_peft_model(llama("linear"), lora(init_lora_weights=True)).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())) > 20
    octavo.load_adapter(llama(), tmp_path, "x")
