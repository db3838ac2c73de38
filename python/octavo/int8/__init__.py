"""LLM.int8() (arXiv 2208.07339): int8 weights and activations, outlier columns in 16 bit."""

from .functional import int8_linear_train, int8_matmul
from .linear import Int8Linear
from .method import Int8

__all__ = ["Int8", "Int8Linear", "int8_linear_train", "int8_matmul"]
