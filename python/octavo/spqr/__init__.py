"""SpQR (arXiv 2306.03078): weights in 2 to 4 bits with quantized statistics and unstructured outliers."""

from .weight import SpQRWeight

__all__ = ["SpQRWeight"]
