"""SpQR (arXiv 2306.03078): weights in 2 to 4 bits with quantized statistics and unstructured outliers."""

from .engine.codes import SpQRCodes
from .engine.columns import quantize_weight
from .engine.config import SpQRConfig
from .engine.hessian import Hessian, factorize
from .functional import spqr_matmul
from .linear import SpQRLinear
from .method import GPTQ, RTN, SpQR
from .weight import SpQRWeight

__all__ = [
    "GPTQ",
    "RTN",
    "Hessian",
    "SpQR",
    "SpQRCodes",
    "SpQRConfig",
    "SpQRLinear",
    "SpQRWeight",
    "factorize",
    "quantize_weight",
    "spqr_matmul",
]
