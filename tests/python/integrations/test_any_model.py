"""Models as strangers bring them: what transformers makes of a checkpoint that lacks layers, of names that it maps, of
classes that are linear layers under other names; and programs that never import octavo."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import octavo
import pytest
import torch
from octavo.core.low_bit import LowBitLinear
from small_models import IDS, LLAMA, SIZES, gpt2, llama, logits
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers")


def difference(y, exact):
    return float((y - exact).norm() / exact.norm())


def quantized(model):
    return {name for name, m in model.named_modules() if isinstance(m, LowBitLinear)}


def python(code, **environment):
    """A program of its own: what it prints, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


# ---- without `import octavo` -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of octavo's methods, and the logits of their models."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for method, settings in (("int8", {}), ("nf4", {"double_quant": True}), ("rtn", {"group_size": 16})):
        model = llama()
        octavo.quantize_model(model, method, progress=False, **settings)
        model.save_pretrained(folder / method)
        found[method] = (folder / method, logits(model))
    return found


LOAD = """
import transformers, torch, sys
model = transformers.AutoModelForCausalLM.from_pretrained({path!r}).eval()
print(type(model.model.layers[0].mlp.up_proj).__name__, "octavo" in sys.modules)
print(float(model(torch.arange(16)[None]).logits.double().sum()))
"""


@pytest.mark.parametrize("method", ["int8", "nf4", "rtn"])
def test_a_program_that_never_imports_octavo_loads_its_directories(saved, method):
    path, exact = saved[method]
    code, said = python(LOAD.format(path=str(path)))
    kind, total = said.strip().splitlines()[-2:]
    assert code == 0 and kind.endswith("Linear True") and kind != "Linear True"
    assert float(total) == pytest.approx(float(exact.double().sum()), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("method", ["int8", "nf4", "rtn"])
def test_without_octavo_codes_are_not_taken_for_weights(saved, method):
    code, said = python(LOAD.format(path=str(saved[method][0])), OCTAVO_AUTOLOAD="0")
    assert code != 0 and "size mismatch" in said.lower().replace("mismatched sizes", "size mismatch")


def test_transformers_may_come_first_and_be_half_imported(saved):
    first = "import transformers.quantizers.auto as auto, transformers.modeling_utils, sys\n"  # the first imports torch
    first += "assert 'octavo' in auto.AUTO_QUANTIZER_MAPPING and 'octavo' not in sys.modules\n"
    code, said = python(first + LOAD.format(path=str(saved["int8"][0])))
    assert code == 0, said
    half = (
        "import sys, types, importlib.machinery as m, octavo_autoload\n"
        "module = types.ModuleType('half'); module.__spec__ = m.ModuleSpec('half', None)\n"
        "module.__spec__._initializing = True; sys.modules['half'] = module; seen = []\n"
        "octavo_autoload.when_imported('half', seen.append); assert not seen\n"
        "module.__spec__._initializing = False; import wave; assert seen == [module]\n"
    )
    code, said = python(half)
    assert code == 0, said


def test_a_broken_octavo_breaks_neither_torch_nor_transformers(saved):
    broken = "import sys; sys.modules['octavo'] = None\nimport torch, transformers\nprint('fine')\n"
    code, said = python(broken + LOAD.format(path=str(saved["int8"][0])))
    assert code != 0 and "fine" in said
    assert "the model was quantized by octavo, which is installed and cannot be imported" in said


def test_the_autoloaded_module_imports_the_standard_library_alone():
    code, said = python("import octavo_autoload, sys; print('torch' in sys.modules, 'octavo' in sys.modules)")
    assert (code, said.strip()) == (0, "False False")


# ---- layers that the checkpoint lacks --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("base", "task", "head"),
    [
        (lambda: llama("LlamaModel"), "LlamaForSequenceClassification", "score"),
        (
            lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=128)),
            "BertForSequenceClassification",
            "classifier",
        ),
    ],
    ids=["llama", "bert"],
)
def test_a_new_head_is_a_float_layer_that_trains(tmp_path, method, base, task, head):
    torch.manual_seed(0)
    base().save_pretrained(tmp_path / "base")
    config = octavo.OctavoConfig(method)
    kind = getattr(transformers, task)
    model = kind.from_pretrained(tmp_path / "base", num_labels=3, quantization_config=config, pad_token_id=0).eval()
    layer = model.get_submodule(head)
    assert type(layer) is nn.Linear and layer.weight.requires_grad and 0.005 < float(layer.weight.std()) < 0.08
    assert float(logits(model).abs().max()) < 10 and len(quantized(model)) > 8
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))
    more = kind.from_pretrained(tmp_path / "saved", num_labels=7, ignore_mismatched_sizes=True)
    assert type(more.get_submodule(head)) is nn.Linear and more.get_submodule(head).out_features == 7


def test_heads_stay_float_in_memory_and_peft_trains_them():
    peft = pytest.importorskip("peft")
    model = llama("LlamaForSequenceClassification", num_labels=3)
    report = octavo.quantize_model(model, "nf4", progress=False)
    assert report.skipped == {"score": "it is of the task's head, which another task trains anew"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    model(IDS, labels=torch.tensor([1])).loss.backward()
    everything = llama("LlamaForSequenceClassification", num_labels=3)
    octavo.quantize_model(everything, "nf4", skip=(), progress=False)
    assert "score" in quantized(everything)


# ---- what is a linear layer ------------------------------------------------------------------------------------------


def test_subclasses_that_compute_the_same_are_replaced():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is not nn.Linear
    y = logits(model)
    report = octavo.quantize_model(model, progress=False)
    assert len(report.layers) == 8 and difference(logits(model), y) < 0.05


def test_what_a_report_leaves_is_named():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 8, 6))

    model = nn.ModuleDict({
        "plain": nn.Linear(8, 8), "scaled": Scaled(8, 8), "experts": Experts(), "rnn": nn.GRU(8, 8),
        "attention": nn.MultiheadAttention(8, 2), "pair": nn.Bilinear(4, 4, 4),
        "computed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    })  # fmt: skip
    report = octavo.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == ["plain"]
    expected = {
        "scaled": "Scaled",
        "experts": "experts",
        "rnn": "GRU",
        "attention": "input projection",
        "pair": "Bilinear",
    }
    assert all(word in report.skipped[name] for name, word in expected.items())
    assert "parametrization" in report.skipped["computed"]
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear to quantize:\n  rnn: no method knows a GRU"):
        octavo.quantize_model(nn.ModuleDict({"rnn": nn.GRU(8, 8)}), progress=False)


@pytest.mark.parametrize(("method", "settings"), [("int8", {}), ("nf4", {}), ("rtn", {"group_size": 16})])
def test_gpt2(tmp_path, method, settings):
    model = gpt2()
    y = logits(model)
    report = octavo.quantize_model(model, method, progress=False, **settings)
    assert len(report.layers) == 8 and difference(logits(model), y) < 0.3
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")), logits(model))
    octavo.save_quantized(model, tmp_path / "own")
    assert torch.equal(logits(octavo.load_quantized(tmp_path / "own")), logits(model))
    if method != "rtn":
        gpt2().save_pretrained(tmp_path / "source")
        read = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / "source", quantization_config=octavo.OctavoConfig(method)
        )
        assert difference(logits(read), logits(model)) < 1e-4
    # What is float again is stored as transformers stores it: [in, out], square ones too.
    back = model.dequantize()
    back.save_pretrained(tmp_path / "back")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert type(again.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    torch.testing.assert_close(logits(again), logits(back), rtol=1e-4, atol=1e-4)


def test_gpt2_trains_and_comes_back(tmp_path):
    model = gpt2()
    y, state = logits(model), copy.deepcopy(model.state_dict())
    octavo.add_lora(model, rank=2, dropout=0.0)
    assert torch.allclose(logits(model), y, atol=1e-5)
    model(IDS, labels=IDS).loss.backward()
    octavo.remove_lora(model)
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], tensor) for name, tensor in state.items())
    model.load_state_dict(gpt2().state_dict())
    assert torch.allclose(logits(model), y, atol=1e-5)
    octavo.convert_linears(model)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path)), y)


def test_an_error_in_the_middle_leaves_conv1d_layers():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc"):
        octavo.quantize_model(model, progress=False)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D" and not quantized(model)


# ---- models that octavo changed, saved by transformers ---------------------------------------------------------------


def test_several_methods_in_one_model(tmp_path):
    model = llama()
    octavo.quantize_model(model, "nf4", skip=["lm_head", "self_attn", "down_proj"], blocksize=128, progress=False)
    octavo.quantize_model(model, "int8", skip=["lm_head", "self_attn"], threshold=2.0, progress=False)
    octavo.quantize_model(model, "nf4", skip=["lm_head", "v_proj"], double_quant=True, progress=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    for name, layer in model.named_modules():
        if isinstance(layer, LowBitLinear):
            assert again.get_submodule(name).configuration() == layer.configuration()
    assert type(again.model.layers[0].self_attn.v_proj) is nn.Linear


@pytest.mark.parametrize("method", [None, "nf4", "int8"])
def test_adapters_are_saved_with_the_model(tmp_path, method):
    model = llama()
    if method:
        octavo.quantize_model(model, method, progress=False)
    for name, rank in (("a", 2), ("b", 3)):
        octavo.add_lora(model, rank=rank, name=name, use_rslora=name == "b")
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, octavo.nn.LoRALinear):
                    layer.lora_B[name].normal_(std=0.1)
    octavo.set_adapter(model, "a")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert octavo.lora.list_adapters(again) == octavo.lora.list_adapters(model)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    octavo.set_adapter(again, "b")
    octavo.set_adapter(model, "b")
    assert torch.equal(logits(again), logits(model))
    octavo.remove_lora(model)
    assert (getattr(model.config, "quantization_config", None) is None) == (method is None)


def test_prepared_layers_are_not_saved_as_others(tmp_path):
    model = llama()
    octavo.convert_linears(model)
    octavo.prepare_for_eval(model)
    with pytest.raises(
        ValueError, match="was prepared for evaluation by prepare_for_eval, which save_pretrained cannot"
    ):
        model.save_pretrained(tmp_path)


def test_names_that_transformers_maps(tmp_path):
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=32, patch_size=16, projection_dim=32)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**LLAMA), image_token_id=120
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "source")
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    read = load(tmp_path / "source", quantization_config=octavo.OctavoConfig("nf4", skip=["vision_tower", "lm_head"]))
    assert quantized(read) and not any("vision_tower" in name for name in quantized(read))
    read.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(read))
    with pytest.raises(ValueError, match="skip names no linear layer of LlavaForConditionalGeneration: nothing"):
        load(tmp_path / "source", quantization_config=octavo.OctavoConfig("nf4", skip=["nothing"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {"model.layers.0.mlp.up_proj": {"method": "int9"}}}, r"layers\['model.layers.0.mlp.up_proj'\]"),
        ({"layers": {"x": []}}, r"layers\['x'\] = \[\]"),
        ({"adapters": {"x": {"adapters": {"a": {"rank": 0, "alpha": 1}}, "active": "a"}}}, "rank must be an integer"),
        ({"adapters": {"x": {"adapters": {}, "active": None}}}, "adapters of x, which LlamaForCausalLM lacks"),
        ({"method": "int9"}, "int9"),
    ],
)
def test_a_configuration_that_was_changed(saved, tmp_path, change, message):
    import shutil

    path = tmp_path / "changed"
    shutil.copytree(saved["nf4"][0], path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_parameters_are_counted_as_those_of_the_model():
    plain = llama()
    for method in ("int8", "nf4"):
        model = llama()
        octavo.quantize_model(model, method, progress=False)
        assert model.num_parameters() == plain.num_parameters()
        assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()


def test_trainer_trains_adapters_and_refuses_a_model_without(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=octavo.OctavoConfig("nf4")
    )
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    options = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "report_to": [], "use_cpu": True, "save_steps": 1}
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, transformers.TrainingArguments(**options), train_dataset=data)
    octavo.add_lora(model, rank=2, dropout=0.0)
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**options), train_dataset=data)
    trainer.train()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    resumed = transformers.Trainer(
        model, transformers.TrainingArguments(**options | {"max_steps": 3}), train_dataset=data
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# ---- weights that are read past the forward --------------------------------------------------------------------------


def test_adapters_of_layers_whose_weight_is_read_learn():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = transformers.MambaForCausalLM(config)
    octavo.quantize_model(model, "nf4", progress=False)
    octavo.add_lora(model, rank=2, dropout=0.0)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    layer = model.backbone.layers[0].mixer.dt_proj
    with pytest.raises(RuntimeError, match=r"LoRALinear\.weight is read from base and adapter"):
        layer.weight.data.mul_(2)


def test_adapters_that_get_no_gradient_are_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Model()
    octavo.add_lora(model, rank=2)
    with pytest.warns(UserWarning, match="adapter 'default' got no gradient in idle: the layers were not called"):
        model(torch.randn(2, 4)).sum().backward()


def test_wrappers_are_seen_through(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    x = torch.randn(4, 64)
    for number, wrap in enumerate((lambda m: torch.compile(m, backend="eager"), nn.DataParallel)):
        model = wrap(make())
        octavo.quantize_model(model, "nf4", progress=False)
        y = model(x)
        octavo.save_quantized(model, tmp_path / str(number))
        assert torch.equal(octavo.load_quantized(tmp_path / str(number), make())(x), y)
        assert torch.equal(octavo.load_quantized(tmp_path / str(number), wrap(make()))(x), y)
