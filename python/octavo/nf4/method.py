"""The method "nf4": weights in 4 bits for whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import Method, MethodSettings, Showcase, Trial, option, register
from .linear import NF4Linear
from .ops import BITS
from .weight import BLOCKSIZES, NESTED_BLOCKSIZE, check_options, quantize_4bit


@register("nf4")
class NF4(Method):
    """QLoRA's weights (arXiv 2305.14314): 4 bits, a scale for each block, and adapters trained on top of them.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> octavo.quantize_model(model, "nf4", double_quant=True, progress=False).description
        'nf4 codes in blocks of 64, double quantization'
    """

    title = "QLoRA's 4 bits, arXiv 2305.14314"
    layer = NF4Linear
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fp4": {"quant_type": "fp4"}}
    beside = ("int8",)
    in_stream = True
    for_training: ClassVar[Mapping[str, Any]] = {"double_quant": True}
    residual = True

    @dataclass(frozen=True)
    class Settings(MethodSettings):
        """Settings of nf4: see `octavo.quantize_4bit`.

        Attributes:
            quant_type: the code book: "nf4" or "fp4", as published; "nf2", "nf3" or "nf8".
            blocksize: weights that share a scale, a power of two from 32 to 4096.
            double_quant: whether the scales are quantized, too: 4.127 bits a weight instead of 4.5.
        """

        quant_type: str = option("nf4", f"the code book: {', '.join(BITS)}", metavar="TYPE")
        blocksize: int = option(
            64, f"weights that share a scale, from {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}", metavar="N"
        )
        double_quant: bool = option(False, "quantize the scales, too: 4.13 bits a weight instead of 4.5")

        def check(self) -> None:
            check_options(self.quant_type, self.blocksize)

        def describe(self) -> str:
            nested = ", double quantization" if self.double_quant else ""
            return f"{self.quant_type} codes in blocks of {self.blocksize}{nested}"

    showcase: ClassVar[tuple[Showcase, ...]] = (
        Showcase("NF4, blocks of 64", {}, "QLoRA's base"),
        Showcase("NF4, double quantization", {"double_quant": True}, "as QLoRA trains on it"),
    )

    def quantize_linear(self, linear: nn.Linear, settings: Settings, kept: Any = None) -> NF4Linear:
        return NF4Linear.from_linear(linear, settings.quant_type, settings.blocksize, settings.double_quant)

    def quantize_stored(self, weight: Tensor, settings: Settings) -> dict[str, Tensor]:
        quantized = quantize_4bit(weight, settings.quant_type, settings.blocksize, settings.double_quant)
        scale, span = quantized.absmax, quantized.blocksize
        if quantized.nested_absmax is not None:
            scale, span = quantized.nested_absmax, span * NESTED_BLOCKSIZE
        if len(bad := (~weight.isfinite()).flatten().nonzero().flatten()):
            scale[bad // span] = torch.nan
        tensors = zip(NF4Linear.tensors, quantized.tensors(), strict=True)
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def settings_of(self, description: str) -> dict[str, Any] | None:
        quant_type, *words = description.split(" ")
        if quant_type not in BITS:
            return None
        found: dict[str, Any] = {"quant_type": quant_type, "double_quant": "double_quant" in words}
        for word in words:
            name, equals, value = word.partition("=")
            if equals and name == "blocksize" and value.isdigit():
                found[name] = int(value)
            elif word != "double_quant":
                return None
        return found

    def trial(self) -> Trial:
        plain = super().trial()
        return Trial(plain.model, plain.inputs, {"double_quant": True}, bound=0.25)
