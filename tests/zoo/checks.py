"""What must hold of every model: one function a check, each returns a figure or a word, or raises."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import octavo
import torch
from families import Family, inputs_of
from octavo.core.linears import is_conv1d
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import methods
from torch import Tensor, nn

# Settings of each method, and how far its outputs may be from the unquantized model's. The weights of the zoo are
# random: what 3 or 4 bits lose of them is not averaged out as in a trained model.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({}, 0.15),
    "nf4": ({"double_quant": True}, 0.8),
    "rtn": ({"group_size": 16}, 0.8),
}
CHECKS = ("forward", "from_pretrained", "save_pretrained", "save_quantized", "lora step", "generate")


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """All floats of the model's output, as one vector."""
    with torch.no_grad():
        return _flat(model(**inputs))


def _flat(out: Any) -> Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state")
    found = next(value for name in names if (value := getattr(out, name, None)) is not None)
    return found.detach().float().flatten()


def difference(y: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact output, without its mean."""
    return float((y - exact).norm() / (exact - exact.mean()).norm().clamp_min(1e-12))


def share(model: nn.Module, report: Any) -> float:
    """The share of the weights of matrix products that are quantized now; embeddings are no products."""
    done = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, LowBitLinear))
    whole = done
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            continue
        if isinstance(module, nn.Linear) or is_conv1d(module):
            whole += module.weight.numel()
        elif not isinstance(module, nn.modules.conv._ConvNd | nn.Embedding):
            whole += sum(p.numel() for p in module._parameters.values() if p is not None and p.dim() == 3)
    return done / max(1, whole)


def _quantized(family: Family, method: str) -> tuple[Any, Any]:
    model = family.make()
    return model, octavo.quantize_model(model, method, progress=False, **METHODS[method][0])


def forward(family: Family, method: str) -> str:
    inputs = inputs_of(family)
    exact = output(family.make(), inputs)
    model, report = _quantized(family, method)
    lost = difference(output(model, inputs), exact)
    assert lost < METHODS[method][1], f"WRONG: {lost:.3f} from the unquantized model's output"
    return f"{share(model, report):.0%}"


def from_pretrained(family: Family, method: str) -> str:
    """Quantized while it is read, it is what it becomes in memory."""
    if not methods()[method].in_stream:
        return "-"
    inputs = inputs_of(family)
    with tempfile.TemporaryDirectory() as folder:
        source = family.make()
        source.save_pretrained(folder)
        config = octavo.OctavoConfig(method, **METHODS[method][0])
        read = type(source).from_pretrained(folder, quantization_config=config)
    octavo.quantize_model(source, method, progress=False, **METHODS[method][0])
    lost = difference(output(read, inputs), output(source, inputs))
    assert lost < 0.02, f"WRONG: {lost:.3f} from the model that was quantized in memory"  # see _same_output
    return "equal"


def save_pretrained(family: Family, method: str) -> str:
    inputs = inputs_of(family)
    model, _ = _quantized(family, method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read = type(model).from_pretrained(folder)
    _same_tensors(read, model)
    _same_output(output(read, inputs), output(model, inputs))
    return "equal"


def save_quantized(family: Family, method: str) -> str:
    inputs = inputs_of(family)
    model, _ = _quantized(family, method)
    with tempfile.TemporaryDirectory() as folder:
        octavo.save_quantized(model, Path(folder) / "saved")
        read = octavo.load_quantized(Path(folder) / "saved")
    _same_tensors(read, model)
    _same_output(output(read, inputs), output(model, inputs))
    return "equal"


def _same_tensors(read: nn.Module, model: nn.Module) -> None:
    mine, theirs = model.state_dict(), read.state_dict()
    assert mine.keys() == theirs.keys(), f"WRONG: tensors {sorted(mine.keys() ^ theirs.keys())[:4]}"
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), f"WRONG: {name} is another after loading"


def _same_output(y: Tensor, exact: Tensor) -> None:
    """Of equal tensors equal outputs: but for the order of sums in torch's products, which the memory's alignment
    decides, and which may turn a code of an int8 input."""
    assert (lost := difference(y, exact)) < 0.02, f"WRONG: outputs differ by {lost:.3f} after loading"


def lora_step(family: Family, method: str) -> str:
    """Every adapter gets a gradient, a step changes the output, and the adapted model is saved and read again."""
    inputs = inputs_of(family)
    try:
        _with_gradient(family.make().requires_grad_()(**inputs)).square().mean().backward()
    except RuntimeError:  # not even unquantized: rwkv in transformers 5.24 changes its states in place
        return "-"
    model, _ = _quantized(family, method)
    before = output(model, inputs)
    octavo.add_lora(model, rank=2, dropout=0.0)
    optimizer = octavo.optim.AdamW8bit(model.parameters(), lr=0.05)
    loss = _with_gradient(model(**inputs)).square().mean()
    loss.backward()
    optimizer.step()
    after = output(model, inputs)
    assert after.isfinite().all() and not torch.equal(after, before), "WRONG: a step changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read = type(model).from_pretrained(folder)
    _same_tensors(read, model)
    _same_output(output(read, inputs), after)
    return "learns"


def _with_gradient(out: Any) -> Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(value for name in names if (value := getattr(out, name, None)) is not None)


def generate(family: Family, method: str) -> str:
    if not family.generates:
        return "-"
    inputs = {name: value for name, value in inputs_of(family).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model = family.make()
    with torch.no_grad():
        try:
            model.generate(**inputs, **options)
        except Exception:  # not even unquantized: switch in transformers 5.24
            return "-"
        octavo.quantize_model(model, method, progress=False, **METHODS[method][0])
        out = model.generate(**inputs, **options)
    assert out.shape[0] == 2 and out.shape[1] >= 4
    return "4 tokens"


_BY_NAME: dict[str, Callable[[Family, str], str]] = {
    "forward": forward,
    "from_pretrained": from_pretrained,
    "save_pretrained": save_pretrained,
    "save_quantized": save_quantized,
    "lora step": lora_step,
    "generate": generate,
}


def check(family: Family, method: str, name: str) -> str:
    """The result of one check; AssertionError or what the model raised where it fails."""
    try:
        return _BY_NAME[name](copy.deepcopy(family), method)
    finally:
        gc.collect()
