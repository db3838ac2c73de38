"""What octavo 0.1.0 wrote before its rooms and registry loads to the same bits, and is written the same: tests/data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil

import octavo
import pytest
import torch
from octavo import _C
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import method_of_description
from octavo.lora.adapters import base_quantization
from octavo.optim import AdamW8bit
from places import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

BEFORE = ROOT / "tests" / "data" / "before"
SAVED = ("int8", "nf4", "fp4", "spqr", "mixed")


@pytest.fixture(autouse=True)
def _one_machine():
    """The instruction set and number of threads that the files were written with."""
    isa, threads = _C.isa(), torch.get_num_threads()
    _C.set_isa("portable")
    torch.set_num_threads(1)
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


def model(seed=9):
    """The model of make.py, with other weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False)).eval()


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def expected(path):
    """The tensors of a file, and the hashes in its header."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def contents(path):
    """Names, dtypes, shapes and bytes of a safetensors file's tensors."""
    return {name: (t.dtype, t.shape, t.view(-1).view(torch.uint8).tolist()) for name, t in load_file(path).items()}


@torch.no_grad()
def probe():
    """As in make.py: whether torch's own products are here what they were."""
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(6))
    low = x.bfloat16() @ w.bfloat16()
    steps = (x @ w, nn.functional.gelu(x), torch.softmax(x @ w[:, :12], -1), low.float(), (x[:5] @ w[:, :2]) @ w[:2])
    return digest(torch.cat([step.flatten() for step in steps]))


def assert_same_output(now, was):
    """Equal, unless torch's own products are rounded in another way on this machine."""
    if probe() == (BEFORE / "probe.txt").read_text().strip():
        assert torch.equal(now, was)
    else:
        torch.testing.assert_close(now, was, rtol=2e-2, atol=2e-2)


def aligned(net):
    """The model with tensors in memory of their own: some of torch's products depend on where a file has them."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    return net


@torch.no_grad()
def run(net, x):
    return aligned(net)(x.clone())


def weights(net):
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LowBitLinear)}
    return {name: digest(layer.dequantize(torch.float32).weight) for name, layer in layers.items()}


@pytest.mark.parametrize("kind", SAVED)
def test_saved_directories(kind, tmp_path):
    old = BEFORE / "saved" / kind
    net = octavo.load_quantized(old, model)
    tensors, hashes = expected(BEFORE / "saved" / f"{kind}.safetensors")
    assert weights(net) == hashes and len(hashes) == 2
    assert_same_output(run(net, tensors["x"]), tensors["out"])
    octavo.save_quantized(net, tmp_path / "again")
    assert (tmp_path / "again" / "octavo.safetensors").read_bytes() == (old / "octavo.safetensors").read_bytes()
    assert json.loads((tmp_path / "again" / "octavo.json").read_text()) == json.loads((old / "octavo.json").read_text())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("int8", {"threshold": 2.0, "keep_outliers": True}),
        ("nf4", {"double_quant": True}),
        ("fp4", {"blocksize": 128}),
        ("spqr", {"bits": 3, "group_size": 16}),
    ],
)
def test_the_same_model_is_quantized_to_the_same_files(kind, settings, tmp_path):
    """quantize_model itself is what it was: the weights are drawn as in make.py, the report changed its form only."""
    x = expected(BEFORE / "saved" / f"{kind}.safetensors")[0]["x"]
    batches = {
        "int8": [x],
        "spqr": [torch.randn(64, 64, generator=torch.Generator().manual_seed(2 + i)) for i in range(4)],
    }
    net = model(0)
    octavo.quantize_model(net, kind, calibration=batches.get(kind), progress=False, **settings)
    octavo.save_quantized(net, tmp_path / "saved")
    assert contents(tmp_path / "saved" / "octavo.safetensors") == contents(
        BEFORE / "saved" / kind / "octavo.safetensors"
    )


@pytest.mark.parametrize("kind", ["int8", "nf4", "spqr"])
def test_transformers_directories(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert octavo.OctavoConfig("int8").quant_method == "octavo"  # this registers the format

    old = BEFORE / "transformers" / kind
    net = transformers.AutoModelForCausalLM.from_pretrained(old)
    tensors, hashes = expected(BEFORE / "transformers" / f"{kind}.safetensors")
    assert weights(net) == hashes and len(hashes) == 14
    net.save_pretrained(tmp_path / "again")
    now = run(net, torch.arange(12).reshape(2, 6)).logits  # in bf16, and with sums in the order that memory suggests
    torch.testing.assert_close(now, tensors["out"], rtol=2e-2, atol=2e-2)
    # Codes are flat in new files, so that who cannot read them does not take them for weights.
    again, before = (load_file(path / "model.safetensors") for path in (tmp_path / "again", old))
    assert all(torch.equal(again[name].flatten(), tensor.flatten()) for name, tensor in before.items())
    assert all(name.endswith(".weight") for name in again.keys() - before.keys())
    was, now = (
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (old, tmp_path / "again")
    )
    assert now == {name: value for name, value in was.items() if value is not None}
    assert (now["quant_method"], now["method"]) == ("octavo", kind)


@pytest.mark.parametrize(
    ("kind", "described", "settings"),
    [
        ("int8", "int8", {}),
        ("nf4", "nf4 double_quant", {"quant_type": "nf4", "double_quant": True}),
        ("fp4", "fp4 blocksize=128", {"quant_type": "fp4", "double_quant": False, "blocksize": 128}),
    ],
)
def test_adapters(kind, described, settings, tmp_path):
    old = BEFORE / "adapters" / kind
    net = octavo.load_quantized(BEFORE / "saved" / kind, model)
    octavo.load_adapter(net, old)
    tensors, _ = expected(BEFORE / "adapters" / f"{kind}.safetensors")
    assert_same_output(run(net, tensors["x"]), tensors["out"])
    assert base_quantization(net, kind) == described
    with safe_open(old / "adapter_model.safetensors", framework="pt") as file:
        assert described in file.metadata().values()
    found, given = method_of_description(described)
    assert (found.name, given) == ("int8" if kind == "int8" else "nf4", settings)
    octavo.save_adapter(net, tmp_path / "again", kind)
    now, was = (expected(path / "adapter_model.safetensors")[1] for path in (tmp_path / "again", old))
    assert now == was
    assert contents(tmp_path / "again" / "adapter_model.safetensors") == contents(old / "adapter_model.safetensors")
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (old / "adapter_config.json").read_bytes()


def test_optimizer_state():
    start, _ = expected(BEFORE / "optimizer" / "params.safetensors")
    params = [nn.Parameter(start[str(i)].clone()) for i in range(len(start))]
    optimizer = AdamW8bit(params, lr=1.0)  # its options come with the state
    state = torch.load(BEFORE / "optimizer" / "adamw8bit.pt", weights_only=True)
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    for index, entries in state["state"].items():
        assert again["state"][index].keys() == entries.keys()
        for name, value in entries.items():
            ours = again["state"][index][name]
            assert torch.is_tensor(value) == torch.is_tensor(ours)
            if torch.is_tensor(value):
                # Steps were counted in fp32, which stops at 2**24.
                wanted = torch.float64 if name == "step" else value.dtype
                assert ours.dtype is wanted and torch.equal(ours, value.to(wanted)), name
            else:
                assert ours == value, name
    for number in (3, 4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + number))
        before = [param.detach().clone() for param in params]
        optimizer.step()  # first moments are coded with dither since, so that parameters are others
    for param, old in zip(params, before, strict=True):
        assert bool(param.isfinite().all()) and float((param != old).float().mean()) > 0.99


def test_an_unfinished_run_goes_on(tmp_path):
    for name in ("transformers", "accelerate", "gguf", "matplotlib"):
        pytest.importorskip(name)
    from octavo.finetune import Settings, finetune

    old, where = BEFORE / "finetune", tmp_path / "finetune"
    shutil.copytree(old, where)
    given = json.loads((old / "settings.json").read_text())
    given = {name: value for name, value in given.items() if value != getattr(Settings(), name, None)}
    assert given.pop("double_quant", None) is None
    with _inside(tmp_path):
        result = finetune("finetune/model", "finetune/text.txt", "finetune/run", Settings(**given), resume=True)
    assert result.finished and result.steps == 6
    lines = [json.loads(line) for line in (where / "run" / "losses.jsonl").read_text().splitlines()]
    measured = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    assert_same_losses(measured, json.loads((old / "losses.json").read_text()))
    ours = load_file(where / "run" / "adapter" / "adapter_model.safetensors")
    theirs = load_file(old / "adapter.safetensors")
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name in ours:
        assert ours[name].dtype is theirs[name].dtype
        assert_same_output(ours[name], theirs[name])
    was, now = (json.loads((path / "run" / "finetune.json").read_text()) for path in (old, where))
    assert now["format"] == was["format"] == 1 and now["finished"] and not was["finished"]
    assert {name: now[name] for name in ("settings", "model", "data")} == {
        name: was[name] for name in ("settings", "model", "data")
    }


def assert_same_losses(now, was):
    """The steps before the interruption to the bit, as they are in the file; those after it as outputs are compared."""
    assert [line.keys() for line in now] == [line.keys() for line in was]
    for ours, theirs in zip(now, was, strict=True):
        if theirs["step"] < 3:
            assert ours == theirs
        for name, value in theirs.items():
            assert_same_output(torch.tensor(ours[name]).double(), torch.tensor(value).double())


@contextlib.contextmanager
def _inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_operators_have_the_schemas_that_they_had():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("octavo::")}
    now = sorted(str(torch._C._get_schema(*name.partition(".")[::2])) for name in names)
    assert now == (BEFORE / "schemas.txt").read_text().splitlines()
