"""The modules of all families: quantized linear layers, adapters, layers that train in 8 bit, `StableEmbedding`."""

from __future__ import annotations

from .int8.linear import Int8Linear
from .lora.linear import LoRALinear
from .nf4.linear import NF4Linear
from .optim.embedding import StableEmbedding
from .spqr.linear import SpQRLinear
from .switchback.attention import SwitchBackMultiheadAttention
from .switchback.linear import LayerScale, SwitchBackLinear

__all__ = [
    "Int8Linear",
    "LayerScale",
    "LoRALinear",
    "NF4Linear",
    "SpQRLinear",
    "StableEmbedding",
    "SwitchBackLinear",
    "SwitchBackMultiheadAttention",
]
