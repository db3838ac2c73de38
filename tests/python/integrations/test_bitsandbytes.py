"""Checkpoints of bitsandbytes: read and written to the byte, beside bitsandbytes itself where it is installed."""

from __future__ import annotations

import copy
import json
import types

import octavo
import pytest
import torch
from octavo.integrations.bitsandbytes import load_bitsandbytes, to_bitsandbytes_state
from octavo.nf4.bitsandbytes import MARK
from octavo.nn import Int8Linear, NF4Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Model(nn.Module):
    """A head tied to the embedding, a layer under two names, one that stays as it is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.alias = self.down
        self.plain = nn.Linear(64, 64)
        self.head = nn.Linear(64, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.plain(self.alias(torch.relu(self.up(self.embed(ids))))))


IDS = torch.arange(30).reshape(3, 10)


def quantized(method="nf4", **options):
    model = Model().eval()
    octavo.quantize_model(model, method, skip=["plain"], progress=False, **options)
    return model


def assert_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (tensor, other))
        assert torch.equal(a, b), name


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- beside bitsandbytes ---------------------------------------------------------------------------------------------


def linear4bit(linear: nn.Linear, quant_type: str, double_quant: bool):
    """Its module with this layer's weights, quantized by it."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    options = {"quant_type": quant_type, "compress_statistics": double_quant}
    module = bnb.nn.Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=dtype, **options)
    module.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, **options)
    module.bias = linear.bias
    return module.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_state_comes_back_to_the_byte(kind, bias, dtype):
    linear = nn.Linear(96, 33, bias=bias, dtype=dtype)
    theirs = linear4bit(linear, *kind)
    state = {f"0.{name}": tensor.clone() for name, tensor in theirs.state_dict().items()}
    model = load_bitsandbytes(state, nn.Sequential(nn.Linear(96, 33, bias=bias, device="meta")))
    assert_bytes(to_bitsandbytes_state(model), state)
    layer = model[0]
    assert type(layer) is NF4Linear and layer.weight_dtype is dtype
    functional = pytest.importorskip("bitsandbytes").functional
    flat = functional.QuantState.from_dict(
        {k: v for k, v in theirs.weight.quant_state.as_dict(packed=True).items()}, "cpu"
    )
    flat.shape = torch.Size((1, 96 * 33))  # in one row: of rows of 96 its AVX-512 code makes something else
    weight = functional.dequantize_4bit(theirs.weight.detach(), flat).view(33, 96)
    ours = layer.dequantize().weight
    assert torch.equal(ours, weight) if dtype is torch.float32 else torch.allclose(ours, weight, rtol=2.0**-7)


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_reads_ours(double_quant):
    """What octavo quantized, bitsandbytes takes for its own: Params4bit.from_prequantized, as transformers does."""
    bnb = pytest.importorskip("bitsandbytes")
    ours = NF4Linear.from_linear(nn.Linear(128, 64), double_quant=double_quant)
    state = to_bitsandbytes_state(ours)
    stats = {name.removeprefix("weight."): tensor for name, tensor in state.items() if name.startswith("weight.")}
    theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=theirs)
    theirs.bias = ours.bias
    assert_bytes(theirs.state_dict(), state)
    x = torch.randn(5, 128)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_multiple_of_the_block():
    """Of such rows bitsandbytes 0.50 dequantizes another weight with AVX-512; what it stored is right."""
    linear = nn.Linear(80, 64)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 3, 64)[:, None])
    state = linear4bit(linear, "nf4", False).state_dict()
    model = load_bitsandbytes({f"0.{name}": tensor for name, tensor in state.items()}, nn.Sequential(nn.Linear(80, 64)))
    assert_bytes(to_bitsandbytes_state(model), to_bitsandbytes_state(nn.Sequential(NF4Linear.from_linear(linear))))
    error = (model[0].dequantize().weight - linear.weight).flatten()
    scale = model[0].absmax.repeat_interleave(64)
    assert bool((error.abs() <= 0.153 * scale).all())  # half the widest gap of the code book


def test_its_int8_state():
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 48)
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    theirs.load_state_dict(linear.state_dict())
    state = {f"0.{name}": tensor for name, tensor in theirs.to("cpu").state_dict().items()}
    model = load_bitsandbytes(state, nn.Sequential(nn.Linear(64, 48)))
    assert type(model[0]) is Int8Linear
    back = to_bitsandbytes_state(model)
    assert list(back) == list(state)
    assert torch.equal(back["0.weight"], state["0.weight"])
    torch.testing.assert_close(back["0.SCB"], state["0.SCB"], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["nf4", "fp4", "int8"])
def test_directories_of_transformers(tmp_path, case, dtype):
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from octavo.models import find_source, load_model

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attention_bias=True, tie_word_embeddings=case != "int8", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "source")
    double = case == "nf4"
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": case, "bnb_4bit_use_double_quant": double}
    options = {"load_in_8bit": True, "llm_int8_threshold": 5.0} if case == "int8" else options
    quantization = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    Auto = transformers.AutoModelForCausalLM
    theirs = Auto.from_pretrained(tmp_path / "source", quantization_config=quantization)
    theirs.save_pretrained(tmp_path / "bnb", max_shard_size="40KB")
    assert len(list((tmp_path / "bnb").glob("*.safetensors"))) > 1
    assert find_source(tmp_path / "bnb").quantization == "bitsandbytes"

    model = load_model(find_source(tmp_path / "bnb"))
    stored = {}
    for file in (tmp_path / "bnb").glob("*.safetensors"):
        stored |= load_file(file)
    back = {name: tensor for name, tensor in to_bitsandbytes_state(model).items() if name in stored}
    assert back.keys() == stored.keys()
    scb = {name: back.pop(name) for name in list(back) if name.endswith(".SCB")}
    assert_bytes(back, {name: stored[name] for name in back})
    assert all(torch.allclose(tensor, stored[name], rtol=2.0**-22) for name, tensor in scb.items())
    kind = Int8Linear if case == "int8" else NF4Linear
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) == 14 and type(model.lm_head) is nn.Linear
    if case == "int8":
        assert {layer.threshold for layer in layers} == {5.0}
    else:
        assert {(layer.quant_type, layer.double_quant, layer.weight_dtype) for layer in layers} == {
            (case, double, dtype)
        }
        assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        ours, reference = model(ids).logits, theirs.train()(ids).logits
        assert ours.dtype is reference.dtype is dtype
        assert float((ours - reference).norm() / reference.norm()) < (0.02 if dtype is torch.bfloat16 else 0.015)
        model.save_pretrained(tmp_path / "octavo")
        again = Auto.from_pretrained(tmp_path / "octavo")
        assert json.loads((tmp_path / "octavo" / "config.json").read_text())["quantization_config"]["skip"] == [
            "lm_head"
        ]
        assert torch.equal(again(ids).logits, ours)
        half = load_model(find_source(tmp_path / "bnb"), torch.float16)
        assert half(ids).logits.dtype is torch.float16
        assert torch.equal(half.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


# ---- models in general -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("target", ["new", "meta", "quantized"])
def test_a_model_is_changed_in_place(method, target):
    source = quantized(method)
    state = to_bitsandbytes_state(source)
    assert any(MARK in name for name in state) == (method == "nf4")
    with torch.device("meta"):
        meta = Model()
    other = quantized() if method == "int8" else quantized(double_quant=True)
    model = {"new": Model(), "meta": meta, "quantized": other}[target].eval()
    assert load_bitsandbytes(state, model) is model
    left, right = source.state_dict(), model.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype is tensor.dtype
        torch.testing.assert_close(right[name], tensor, rtol=2.0**-22 if name.endswith("weight_scale") else 0, atol=0)
    assert model.alias is model.down and model.head.weight is model.embed.weight
    assert type(model.plain) is nn.Linear and model.plain.weight.requires_grad and model.up.bias.requires_grad
    torch.testing.assert_close(model(IDS), source(IDS))


def test_files_and_shards(tmp_path):
    source = quantized(double_quant=True)
    state = {name: tensor.detach().clone() for name, tensor in to_bitsandbytes_state(source).items()}
    del state["head.weight"]  # tied: transformers stores it once
    names = list(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({name: state[name].contiguous() for name in keys}, tmp_path / file)
    save_file({"stranger": torch.ones(1)}, tmp_path / "c.safetensors")
    index = {"weight_map": {name: file for file, keys in parts.items() for name in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load_bitsandbytes(tmp_path, Model().eval())
    assert torch.equal(model(IDS), source(IDS)) and model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match="the checkpoint has a layer alias, which Linear does not"):
        load_bitsandbytes(tmp_path, nn.Linear(64, 96))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-50])
    model = Model()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"b\.safetensors is not a whole safetensors file"):
        load_bitsandbytes(tmp_path, model)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        load_bitsandbytes(tmp_path, model)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        load_bitsandbytes(tmp_path, model)
    assert type(model.up) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="holds no safetensors file; others are not read"):
        load_bitsandbytes(tmp_path / "empty", model)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_bitsandbytes(tmp_path / "nowhere", model)


STATE = to_bitsandbytes_state(quantized(double_quant=True))


def header(**changes):
    described = json.loads(bytes(STATE[f"up.{MARK}nf4"].tolist())) | changes
    return {f"up.{MARK}nf4": torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)}


EIGHT_BIT = {"plain.weight": torch.ones(64, 64).char(), "plain.SCB": torch.ones(64)}
BAD = {
    "json": ({f"up.{MARK}nf4": STATE[f"up.{MARK}nf4"][:-1]}, "up: .* is not JSON"),
    "blocksize": (header(blocksize=96), "up: blocksize must be a power of two from 32 to 4096, got 96"),
    "other blocksize": (header(blocksize=32), r"up: absmax must be uint8 \[192\], got uint8 \[96\]"),
    "shape": (header(shape=[96, 65]), r"up: weight must be uint8 \[3120\], got uint8 \[3072\]"),
    "turned": (header(shape=[64, 96]), r"up: bias must be float32, float16 or bfloat16 \[64\], got float32 \[96\]"),
    "deep": (header(shape=[96, 8, 8]), r"up: .* has shape = \[96, 8, 8\], not that of a matrix"),
    "huge": (header(shape=[2**62, 4]), r"up: .*weight must be uint8 \[9223372036854775808\], got uint8 \[3072\]"),
    "type": (header(quant_type="af4"), "up: .* has quant_type = 'af4'"),
    "packed": ({"up.weight": STATE["up.weight"][1:]}, r"up: weight must be uint8 \[3072\], got uint8 \[3071\]"),
    "absmax": ({"up.weight.absmax": None}, r"up: weight\.absmax missing"),
    "bias": ({"up.bias": None}, r"\(64, 96, False\) in the checkpoint, \(64, 96, True\) in the model"),
    "foreign": ({"up.lora": torch.ones(1)}, "up: unknown lora"),
    "stranger": ({"more.weight": torch.ones(1)}, r"the checkpoint has more\.weight, which Model does not"),
    "missing": ({"plain.bias": None}, r"Model has plain\.bias, which the checkpoint does not"),
    "sizes": ({"plain.bias": torch.ones(3)}, r"plain\.bias has shape \[3\] in the checkpoint, \[64\] in Model"),
    "layer": (
        {f"none.{name[3:]}": tensor for name, tensor in STATE.items() if name.startswith("up.")},
        "the checkpoint has a layer none, which Model does not",
    ),
    "int8": (EIGHT_BIT | {"plain.weight": torch.ones(64, 64)}, r"plain: weight must be int8 \[64, 64\], got float32"),
    "int8 scales": (EIGHT_BIT | {"plain.SCB": torch.ones(63)}, r"plain: weight_scale must be float32 \[64\]"),
    "int8 layout": (EIGHT_BIT | {"plain.weight_format": torch.tensor(2)}, r"plain: weight_format is 2 \(col_turing\)"),
    "int8 rank": (EIGHT_BIT | {"plain.weight": torch.ones(64).char()}, r"plain: weight must be a matrix, got \[64\]"),
    "int8 alone": (EIGHT_BIT | {"plain.weight": None}, "plain: weight must be a matrix, got none"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_before_the_model_changes(case):
    change, message = BAD[case]
    model = Model()
    before, modules = state_of(model), list(model.modules())
    state = {name: tensor for name, tensor in (STATE | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_bitsandbytes(state, model)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_errors(tmp_path):
    with pytest.raises(ValueError, match="a state dict needs model="):
        load_bitsandbytes(STATE)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 is for a model that is built here"):
        load_bitsandbytes(STATE, Model(), torch.float16)
    with torch.device("meta"):
        model = Model()
        model.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match="buffer scale of Model is on the meta device and not in the checkpoint"):
        load_bitsandbytes(STATE, model)
    with pytest.raises(ValueError, match="no layer of bitsandbytes in it"):
        load_bitsandbytes(Model().state_dict(), Model())
    own = to_bitsandbytes_state(NF4Linear.from_linear(nn.Linear(64, 96)))
    with pytest.raises(ValueError, match=r"the model is itself a Linear: use load_state_dict of octavo\.nn\.NF4Linear"):
        load_bitsandbytes(own, nn.Linear(64, 96))
    model = Model()
    model.up = nn.Conv1d(64, 96, 1)
    with pytest.raises(ValueError, match="up is a Conv1d, not a Linear"):
        load_bitsandbytes(STATE, model)
    save_file({name: tensor.detach().clone() for name, tensor in STATE.items()}, tmp_path / "model.safetensors")
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json of transformers: pass model="):
        load_bitsandbytes(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["os"]}')
    with pytest.raises(ValueError, match="has no model class 'os'"):
        load_bitsandbytes(tmp_path)


def test_a_threshold_of_null_is_the_default(tmp_path):
    pytest.importorskip("transformers")
    from octavo.integrations._bitsandbytes_models import _options

    checkpoint = types.SimpleNamespace(headers={})
    for given, threshold in (({}, 6.0), ({"llm_int8_threshold": None}, 6.0), ({"llm_int8_threshold": 5}, 5.0)):
        assert _options(tmp_path, checkpoint, given) == {"method": "int8", "threshold": threshold}
    with pytest.raises(ValueError, match=r"config\.json has llm_int8_threshold = 'x'"):
        _options(tmp_path, checkpoint, {"llm_int8_threshold": "x"})


def test_what_bitsandbytes_has_not_is_not_written():
    model = nn.Sequential(nn.Linear(64, 64), NF4Linear.from_linear(nn.Linear(64, 32), quant_type="nf3"))
    with pytest.raises(ValueError, match="1: bitsandbytes has no quant_type 'nf3'; nf4 and fp4 can be written"):
        to_bitsandbytes_state(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Linear holds no"):
        to_bitsandbytes_state(model[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
