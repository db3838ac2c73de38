"""SwitchBack (arXiv 2304.13013): linear layers and attention whose products are int8 in training."""

from .attention import SwitchBackMultiheadAttention
from .convert import Conversion, convert_linears, prepare_for_eval
from .functional import QuantizedWeight, fp8_linear, switchback_linear, switchback_weight
from .linear import LayerScale, SwitchBackLinear, quantize_once

__all__ = [
    "Conversion",
    "LayerScale",
    "QuantizedWeight",
    "SwitchBackLinear",
    "SwitchBackMultiheadAttention",
    "convert_linears",
    "fp8_linear",
    "prepare_for_eval",
    "quantize_once",
    "switchback_linear",
    "switchback_weight",
]
