"""octavo: low-bit deep learning on PyTorch, compiled for CUDA and CPU. See the README for what it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  loads the libraries that _C links to

from . import _C, nn, optim, reference, spqr
from ._version import __version__
from .autograd import int8_linear_train, int8_matmul, spqr_matmul
from .ops import (
    dequantize_blockwise,
    dequantize_rowwise,
    extract_columns,
    extract_int8_columns,
    find_outlier_columns,
    int8_gemm,
    int8_linear,
    int8_mm,
    optim_step,
    optim_table,
    quantize_blockwise,
    quantize_columnwise,
    quantize_rowwise,
    quantize_rowwise_columnwise,
    quantize_tensorwise,
    spqr_dequantize,
    spqr_linear,
    spqr_quantize_columns,
)
from .quantize import Report, quantize_model
from .serialization import load_quantized, save_quantized

if TYPE_CHECKING:
    from .integrations.transformers import OctavoConfig

__all__ = [
    "OctavoConfig",
    "Report",
    "__version__",
    "cuda_built",
    "dequantize_blockwise",
    "dequantize_rowwise",
    "extract_columns",
    "extract_int8_columns",
    "find_outlier_columns",
    "int8_gemm",
    "int8_linear",
    "int8_linear_train",
    "int8_matmul",
    "int8_mm",
    "load_quantized",
    "nn",
    "optim",
    "optim_step",
    "optim_table",
    "quantize_blockwise",
    "quantize_columnwise",
    "quantize_model",
    "quantize_rowwise",
    "quantize_rowwise_columnwise",
    "quantize_tensorwise",
    "reference",
    "save_quantized",
    "spqr",
    "spqr_dequantize",
    "spqr_linear",
    "spqr_matmul",
    "spqr_quantize_columns",
]


def cuda_built() -> bool:
    """Whether this build has the CUDA kernels."""
    return bool(_C.build_info()["cuda"])


def __getattr__(name: str) -> Any:
    if name == "OctavoConfig":  # importing it imports transformers and registers the quantizer there
        from .integrations.transformers import OctavoConfig

        return OctavoConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
