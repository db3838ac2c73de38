"""octavo: low-bit deep learning on PyTorch, compiled for CUDA and CPU. See the README for what it computes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  loads the libraries that _C links to

from . import _C, nn, optim, reference, spqr
from ._version import __version__
from .adapters import (
    Adapter,
    add_lora,
    delete_adapter,
    list_adapters,
    load_adapter,
    remove_lora,
    save_adapter,
    set_adapter,
)
from .autograd import csr_matmul, int8_linear_train, int8_matmul, nf4_matmul, spqr_matmul
from .autograd_switchback import QuantizedWeight, fp8_linear, quantize_weight, switchback_linear
from .convert import Conversion, convert_linears, prepare_for_eval
from .merging import MergeReport, merge_adapter, unmerge_adapter
from .nf4 import NF4Weight, dequantize_4bit, quantize_4bit
from .nn_switchback import quantize_once
from .ops import (
    csr_grad_values,
    csr_matmul_add,
    csr_matmul_transposed,
    dequantize_blockwise,
    dequantize_rowwise,
    extract_columns,
    extract_int8_columns,
    find_outlier_columns,
    int8_gemm,
    int8_linear,
    int8_mm,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_transposed,
    nf4_quantize,
    optim_step,
    optim_sums,
    optim_table,
    quantize_blockwise,
    quantize_columnwise,
    quantize_columnwise_transpose,
    quantize_rowwise,
    quantize_rowwise_columnwise,
    quantize_rowwise_columnwise_transpose,
    quantize_tensorwise,
    quantize_tensorwise_transpose,
    spqr_dequantize,
    spqr_linear,
    spqr_quantize_columns,
)
from .quantize import Report, quantize_model
from .serialization import load_quantized, save_quantized
from .sparse import csr_to_dense, dense_to_csr, validate_csr

if TYPE_CHECKING:
    from .integrations.transformers import OctavoConfig

__all__ = [
    "Adapter",
    "Conversion",
    "MergeReport",
    "NF4Weight",
    "OctavoConfig",
    "QuantizedWeight",
    "Report",
    "__version__",
    "add_lora",
    "convert_linears",
    "csr_grad_values",
    "csr_matmul",
    "csr_matmul_add",
    "csr_matmul_transposed",
    "csr_to_dense",
    "cuda_built",
    "delete_adapter",
    "dense_to_csr",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_rowwise",
    "extract_columns",
    "extract_int8_columns",
    "find_outlier_columns",
    "fp8_linear",
    "int8_gemm",
    "int8_linear",
    "int8_linear_train",
    "int8_matmul",
    "int8_mm",
    "list_adapters",
    "load_adapter",
    "load_quantized",
    "merge_adapter",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_transposed",
    "nf4_matmul",
    "nf4_quantize",
    "nn",
    "optim",
    "optim_step",
    "optim_sums",
    "optim_table",
    "prepare_for_eval",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_columnwise",
    "quantize_columnwise_transpose",
    "quantize_model",
    "quantize_once",
    "quantize_rowwise",
    "quantize_rowwise_columnwise",
    "quantize_rowwise_columnwise_transpose",
    "quantize_tensorwise",
    "quantize_tensorwise_transpose",
    "quantize_weight",
    "reference",
    "remove_lora",
    "save_adapter",
    "save_quantized",
    "set_adapter",
    "spqr",
    "spqr_dequantize",
    "spqr_linear",
    "spqr_matmul",
    "spqr_quantize_columns",
    "switchback_linear",
    "unmerge_adapter",
    "validate_csr",
]


def cuda_built() -> bool:
    """Whether this build has the CUDA kernels."""
    return bool(_C.build_info()["cuda"])


def __getattr__(name: str) -> Any:
    if name == "OctavoConfig":  # importing it imports transformers and registers the quantizer there
        from .integrations.transformers import OctavoConfig

        return OctavoConfig
    if name == "integrations":  # which imports its modules when they are asked for
        return importlib.import_module(".integrations", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
