"""What the tests of LoRA share: base layers of every kind, a model of them, what must not change."""

from __future__ import annotations

import octavo
import torch
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import stored_methods
from octavo.nn import LoRALinear, NF4Linear, SpQRLinear
from spqr_weights import random_weight
from torch import nn

KINDS = stored_methods()
BASES = ("linear", *KINDS, "nf4 double")
REQUANTIZED = tuple(method for method in KINDS if method != "spqr")  # without calibration data


def base_layer(kind: str, n: int = 48, k: int = 64, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    if kind == "linear":
        return linear
    if kind == "spqr":
        return SpQRLinear.from_weight(random_weight(n, k, unit=2.0**-14), linear.bias)
    if kind == "nf4 double":
        return NF4Linear.from_linear(linear, double_quant=True)
    return KINDS[kind].from_linear(linear)


def train_by_hand(layer: LoRALinear, name: str = "default", std: float = 0.1) -> LoRALinear:
    """An adapter that does something, as after training."""
    with torch.no_grad():
        layer.lora_B[name].normal_(std=std)
    return layer


def dense(base: nn.Module) -> torch.Tensor:
    """The matrix that a base stands for, fp32."""
    return (base.dequantize(torch.float32) if isinstance(base, LowBitLinear) else base).weight.detach().float()


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = base_layer(kind, 96, 64), base_layer(kind, 64, 96, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self, kind: str = "int8", blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 64)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))
        self.lm_head = nn.Linear(64, 20)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]
IDS = torch.arange(12).reshape(3, 4)


def outputs(model):
    with torch.no_grad():
        return model.eval()(IDS)


def randomize(model, name="default", seed=1):
    g = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and name in layer.adapters:
            layer.lora_A[name].data.normal_(std=0.1, generator=g)
            layer.lora_B[name].data.normal_(std=0.1, generator=g)


def with_adapter(kind="int8", name="default", seed=1, **options):
    model = Model(kind)
    octavo.add_lora(model, 4, 8, name=name, **options)
    randomize(model, name, seed)
    return model


def snapshot(model):
    """Everything that a refused call must leave: modules, tensors, what is trained, what is active."""
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    modules = {name: (id(module), getattr(module, "active_adapter", None)) for name, module in model.named_modules()}
    return state, modules, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    state, modules, trained = snapshot(model)
    assert modules == before[1] and trained == before[2]
    assert state.keys() == before[0].keys()
    for name, (place, value) in state.items():
        assert place == before[0][name][0]
        torch.testing.assert_close(value, before[0][name][1], rtol=0, atol=0, equal_nan=True)
