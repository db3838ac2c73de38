"""Models that were changed after octavo marked them, or beside others: what is saved is what there is, or an error."""

from __future__ import annotations

import json
import threading

import octavo
import pytest
import torch
from octavo.core.low_bit import LowBitLinear
from safetensors.torch import load_file, save_file
from small_models import gpt2, llama, logits, noise
from torch import nn
from torch.nn.utils import prune

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
Auto = transformers.AutoModelForCausalLM


def reloaded(model, folder):
    model.save_pretrained(folder)
    return Auto.from_pretrained(folder).eval()


def test_dequantizing_under_adapters_is_refused():
    for method in (None, "nf4"):
        model = llama()
        if method:
            octavo.quantize_model(model, method, progress=False)
        octavo.add_lora(model, rank=2)
        with pytest.raises(ValueError, match=r"has LoRA adapters: octavo\.merge_adapter\(model, keep=False\)"):
            model.dequantize()


@pytest.mark.parametrize("include", [["*.attn.c_proj"], None])
@pytest.mark.parametrize("quantized", [False, True])
def test_float_conv1d_under_adapters(tmp_path, include, quantized):
    model = gpt2()
    if quantized:
        octavo.quantize_model(model, "nf4", skip=["lm_head", "*.attn.c_proj"], progress=False)
    octavo.add_lora(model, rank=2, include=include)
    y = logits(noise(model))
    assert torch.allclose(logits(reloaded(model, tmp_path / "saved")), y, atol=1e-5)
    octavo.merge_adapter(model, keep=False)
    assert torch.allclose(logits(model), y, atol=1e-4)
    assert torch.allclose(logits(reloaded(model, tmp_path / "merged")), logits(model), atol=1e-5)


@pytest.mark.parametrize("target", [r".*attn\.c_proj", ".*c_attn"])
def test_merged_by_peft(tmp_path, target):
    peft = pytest.importorskip("peft")
    model = gpt2()
    octavo.quantize_model(model, "nf4", progress=False)
    model = noise(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target))).merge_and_unload().eval()
    y = logits(model)
    assert torch.allclose(logits(reloaded(model, tmp_path / "saved")), y, atol=1e-5)
    octavo.quantize_model(model, "nf4", progress=False)
    back = model.dequantize()
    assert torch.allclose(logits(reloaded(back, tmp_path / "back")), logits(back), atol=1e-5)
    whole = llama()
    octavo.quantize_model(whole, "nf4", progress=False)
    whole = peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules="all-linear")).merge_and_unload().eval()
    assert torch.equal(logits(reloaded(whole, tmp_path / "whole")), logits(whole))


MAP = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
MAP |= {"transformer.ln_f": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_gpt2_offloaded_to_disk(tmp_path, method, buffers):
    gpt2().save_pretrained(tmp_path / "source")
    config = octavo.OctavoConfig(method)
    whole = Auto.from_pretrained(tmp_path / "source", quantization_config=config).eval()
    options = {"device_map": MAP, "offload_folder": tmp_path / "off", "offload_buffers": buffers}
    part = Auto.from_pretrained(tmp_path / "source", quantization_config=octavo.OctavoConfig(method), **options).eval()
    assert torch.allclose(logits(part), logits(whole), atol=1e-5)


@pytest.mark.parametrize("method", [None, "int8", "nf4"])
def test_adapters_of_offloaded_layers_compute(tmp_path, method):
    model = llama()
    if method:
        octavo.quantize_model(model, method, progress=False)
    octavo.add_lora(model, rank=2)
    y = logits(noise(model))
    model.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    part = Auto.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "off").eval()
    assert torch.allclose(logits(part), y, atol=1e-5)


def test_a_base_model_read_into_one_with_a_head_and_back(tmp_path):
    model = llama()
    octavo.quantize_model(model, "int8", threshold=0.0, skip=["lm_head", "mlp"], progress=False)
    octavo.quantize_model(model, "int8", threshold=2.0, skip=["lm_head"], progress=False)
    octavo.add_lora(model, rank=2)
    noise(model).save_pretrained(tmp_path / "head")
    base = transformers.LlamaModel.from_pretrained(tmp_path / "head").eval()
    assert base.layers[0].mlp.up_proj.base_layer.threshold == 2.0
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = Auto.from_pretrained(tmp_path / "base").eval()
    assert again.model.layers[0].mlp.up_proj.base_layer.threshold == 2.0
    with torch.no_grad():
        assert torch.equal(again.model(ids).last_hidden_state, base(ids).last_hidden_state)


def test_layers_that_were_changed_one_by_one(tmp_path):
    model = llama()
    octavo.quantize_model(model, "nf4", skip=["lm_head", "mlp"], progress=False)
    octavo.quantize_model(model.model.layers[0].mlp, "int8", threshold=2.0, progress=False)
    model.model.layers[0].mlp.down_proj.threshold = 0.0
    other = octavo.nn.NF4Linear.from_linear(model.model.layers[1].self_attn.q_proj.dequantize(), blocksize=128)
    model.model.layers[1].self_attn.q_proj = other
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), logits(model))
    for name, layer in model.named_modules():
        if isinstance(layer, LowBitLinear):
            assert again.get_submodule(name).configuration() == layer.configuration()


def test_models_that_were_made_of_one_configuration(tmp_path):
    config = llama().config
    torch.manual_seed(0)
    a, b = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    octavo.quantize_model(a, "nf4", progress=False)
    assert torch.equal(logits(reloaded(b, tmp_path / "float")), logits(b))
    octavo.quantize_model(b, "int8", progress=False)
    octavo.add_lora(b, rank=2)
    assert torch.equal(logits(reloaded(a, tmp_path / "a")), logits(a))
    assert torch.equal(logits(reloaded(noise(b), tmp_path / "b")), logits(b))
    octavo.remove_lora(b)
    assert torch.equal(logits(reloaded(a, tmp_path / "again")), logits(a))
    a.config.use_cache = False
    assert a.model.config.use_cache is False and config.use_cache is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, c: t.pop("model.layers.0.mlp.up_proj.lora_A.default"),
            r"has no model\.layers\.0\.mlp\.up_proj\.lora_A",
        ),
        (lambda t, c: c["adapters"].pop("model.layers.0.mlp.up_proj"), r"has .*up_proj\.lora_[AB]\.default, of which"),
        (lambda t, c: c.update(adapters=[1]), r"adapters must be a mapping of names of layers, got \[1\]"),
        (lambda t, c: c.update(layers="abc"), "layers must be a mapping"),
        (lambda t, c: c.update(layers={"x": {"method": ["int8"]}}), r"layers\['x'\]"),
        (lambda t, c: c.update(skip=3), "skip must be a list of patterns, got 3"),
        (lambda t, c: c["adapters"]["model.layers.0.mlp.up_proj"].update(active=[]), r"active is \[\]"),
        (lambda t, c: c["adapters"]["model.layers.0.mlp.up_proj"]["adapters"]["default"].update(rank=2**60), "rank of"),
        (lambda t, c: c["adapters"].update({"model.norm": c["adapters"]["model.layers.0.mlp.up_proj"]}), "model.norm"),
    ],
)
def test_adapters_and_configuration_that_do_not_fit(tmp_path, change, message):
    model = llama()
    octavo.quantize_model(model, "nf4", progress=False)
    octavo.add_lora(model, rank=2)
    model.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Auto.from_pretrained(tmp_path)


def test_an_interruption_in_the_middle_is_recorded(tmp_path, monkeypatch):
    model, made = gpt2(), []
    quantize = octavo.nn.NF4Linear.from_linear.__func__

    def interrupted(cls, *arguments):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return quantize(cls, *arguments)

    monkeypatch.setattr(octavo.nn.NF4Linear, "from_linear", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        octavo.quantize_model(model, "nf4", progress=False)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_pefts_own_matrices_are_not_quantized_or_adapted():
    peft = pytest.importorskip("peft")
    model = noise(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    y = logits(model)
    report = octavo.quantize_model(model, "nf4", progress=False)
    assert not any("lora_" in layer.name for layer in report.layers)
    assert any(p.requires_grad for p in model.parameters()) and float((logits(model) - y).norm() / y.norm()) < 0.5
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert not any("lora_" in name for name in octavo.add_lora(adapted, rank=2))


# ---- what reads and what computes ------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class Flipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.flip(1) if x.dim() == 3 else x)


class Clamped(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if self.out_features < 8 else y.clamp(-0.1, 0.1)


class WithMethod(nn.Linear):
    def project(self, x):
        return self(x)


class WithAttribute(nn.Linear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rank = 3


@pytest.mark.parametrize("kind", [Scaled, Flipped, Clamped, WithMethod, WithAttribute])
def test_subclasses_that_are_more_than_a_product_stay(kind):
    model = nn.Sequential(kind(32, 32), nn.Linear(32, 32))
    report = octavo.quantize_model(model, progress=False)
    assert type(model[0]) is kind and list(report.skipped) == ["0"]


def test_no_write_to_a_weight_is_lost():
    layer = octavo.nn.NF4Linear.from_linear(nn.Linear(64, 64))
    before = layer.dequantize().weight.clone()
    writes = [
        lambda: layer.weight.data[3].zero_(),
        lambda: layer.weight[:, :8].zero_(),
        lambda: layer.weight.view(-1).fill_(0),
        lambda: layer.weight.t().zero_(),
        lambda: layer.weight.chunk(2)[0].zero_(),
        lambda: torch._foreach_mul_([layer.weight], 0.0),
        lambda: torch.add(torch.ones(64, 64), 1, out=layer.weight),
        lambda: torch.add(layer.weight, 1, out=layer.weight.data),
        lambda: layer.register_parameter("weight", nn.Parameter(torch.zeros(64, 64))),
        lambda: layer.register_buffer("weight", torch.zeros(64, 64)),
        lambda: delattr(layer, "weight"),
        lambda: setattr(layer, "weight", None),
        lambda: torch.nn.utils.parametrizations.weight_norm(layer),
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError, KeyError)):
            write()
    assert torch.equal(layer.dequantize().weight, before)
    assert torch.equal(layer.weight[3], before[3]) and torch.equal(layer.weight.t().contiguous(), before.t())
    assert torch.equal(layer.weight.chunk(2)[1] + 0, before[32:])


def test_threads_read_a_weight_at_once():
    layer, found = octavo.nn.NF4Linear.from_linear(nn.Linear(256, 256)), []
    exact = layer.dequantize().weight.sum()

    def read():
        for _ in range(50):
            try:
                found.append(torch.equal(layer.weight.sum(), exact))
            except RuntimeError as error:
                found.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def test_adapters_of_gpt2_by_octavos_own_files(tmp_path):
    model = gpt2()
    octavo.add_lora(model, rank=2)
    octavo.save_adapter(noise(model), tmp_path / "adapter")
    other = gpt2()
    octavo.load_adapter(other, tmp_path / "adapter")
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
    assert octavo.add_lora(llama(), rank=2) and not getattr(llama(), "is_quantized", False)
    half = llama()
    octavo.add_lora(half, rank=2)
    assert half.half().dtype is torch.float16
