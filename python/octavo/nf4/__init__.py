"""QLoRA's weights (arXiv 2305.14314): 4 bits by the quantiles of the normal distribution, a scale for each block."""

from .functional import nf4_matmul
from .linear import NF4Linear
from .method import NF4
from .weight import NF4Weight, dequantize_4bit, quantize_4bit

__all__ = ["NF4", "NF4Linear", "NF4Weight", "dequantize_4bit", "nf4_matmul", "quantize_4bit"]
