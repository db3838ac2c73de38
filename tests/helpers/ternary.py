"""A method as another package might bring it: ternary weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from octavo.core import method as registry
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import Method, MethodSettings, option
from torch.nn import functional as F


class TernaryLinear(LowBitLinear):
    """Weights -s, 0 and s, one s for each row."""

    tensors = ("weight", "scale")
    fields: dict[str, Any] = {"cut": float}  # noqa: RUF012

    def __init__(self, in_features, out_features, bias=True, cut=0.7, device=None, dtype=None):
        super().__init__(in_features, out_features)
        self.cut = cut
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(out_features, device=device))
        self._zero_bias(bias, device, dtype)

    @staticmethod
    def quantize(weight, cut):
        mean = weight.float().abs().mean(1, keepdim=True)
        codes = torch.where(weight.float().abs() > cut * mean, weight.float().sign(), 0.0)
        scale = (weight.float() * codes).sum(1) / codes.abs().sum(1).clamp(min=1)
        return {"weight": codes.to(torch.int8), "scale": scale}

    @property
    def nominal_bits(self):
        return 8.0  # an int8 holds a code

    def _dequantized(self, dtype):
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def forward(self, x):
        return F.linear(x, self._dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def figures(self):
        return {"real_bits": self.real_bits, "zeros": float((self.codes == 0).float().mean())}

    @classmethod
    def from_configuration(cls, config, dtype):
        return cls(config["in_features"], config["out_features"], config["bias"], config["cut"], "meta", dtype)

    @classmethod
    def tensor_errors(cls, state, config):
        found = {"weight": (torch.int8, (config["out_features"], config["in_features"]))}
        found["scale"] = (torch.float32, (config["out_features"],))
        if not any(name in state for name in found):
            return []
        errors = [f"has no {name}" for name in found if name not in state]
        errors += [
            f"{name} is {state[name].dtype} {list(state[name].shape)}"
            for name, (dtype, shape) in found.items()
            if name in state and (state[name].dtype is not dtype or tuple(state[name].shape) != shape)
        ]
        if not errors and not state["scale"].is_meta and not state["scale"].isfinite().all():
            errors.append("scale holds NaN or Inf")
        return errors


def make_ternary():
    """The class of the method, which is not registered yet."""

    class Ternary(Method):
        title = "ternary weights"
        layer = TernaryLinear
        aliases = {"ternary-dense": {"cut": 0.25}}  # noqa: RUF012
        in_stream = True

        @dataclass(frozen=True)
        class Settings(MethodSettings):
            cut: float = option(0.7, "the share of a row's mean |w| under which a weight is 0")

        def quantize_linear(self, linear, settings, kept=None):
            new = TernaryLinear(linear.in_features, linear.out_features, linear.bias is not None, settings.cut)
            made = self.quantize_stored(linear.weight.detach(), settings)
            new.weight, new.scale = made["weight"], made["scale"]
            new._copy_bias(linear.bias)
            return new.train(linear.training)

        def quantize_stored(self, weight, settings):
            return TernaryLinear.quantize(weight, settings.cut)

        def trial(self):
            plain = super().trial()
            return registry.Trial(plain.model, plain.inputs, bound=0.7)

    return Ternary
