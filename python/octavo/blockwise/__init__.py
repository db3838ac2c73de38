"""8-bit blocks (arXiv 2110.02861): the dynamic maps, by themselves."""

from .ops import dequantize_blockwise, quantize_blockwise

__all__ = ["dequantize_blockwise", "quantize_blockwise"]
