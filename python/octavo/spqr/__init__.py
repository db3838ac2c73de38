"""SpQR (arXiv 2306.03078): weights in 2 to 4 bits with quantized statistics and unstructured outliers."""

from .codes import SpQRCodes
from .config import SpQRConfig
from .engine import quantize_weight
from .hessian import Hessian, factorize
from .weight import SpQRWeight

__all__ = ["Hessian", "SpQRCodes", "SpQRConfig", "SpQRWeight", "factorize", "quantize_weight"]
