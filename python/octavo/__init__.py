"""octavo: low-bit deep learning on PyTorch, compiled for CUDA and CPU. See the README for what it computes."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  loads the libraries that _C links to

from . import _C as _C
from . import nn, ops, optim
from ._version import __version__
from .blockwise import dequantize_blockwise, quantize_blockwise
from .core.bridges import connect as _connect_other_libraries
from .core.moved import install as _find_moved_modules
from .int8 import int8_matmul
from .lora import add_lora, load_adapter, merge_adapter, remove_lora, save_adapter, set_adapter, unmerge_adapter
from .models import load_quantized, quantize_model, save_quantized
from .nf4 import dequantize_4bit, nf4_matmul, quantize_4bit
from .ops import dequantize_rowwise, quantize_rowwise
from .sparse import csr_matmul
from .spqr import spqr_matmul
from .switchback import convert_linears, prepare_for_eval, switchback_linear

if TYPE_CHECKING:
    from .integrations.transformers import OctavoConfig

__all__ = [
    "OctavoConfig",
    "__version__",
    "add_lora",
    "convert_linears",
    "csr_matmul",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_rowwise",
    "int8_matmul",
    "load_adapter",
    "load_quantized",
    "merge_adapter",
    "nf4_matmul",
    "nn",
    "ops",
    "optim",
    "prepare_for_eval",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_model",
    "quantize_rowwise",
    "remove_lora",
    "save_adapter",
    "save_quantized",
    "set_adapter",
    "spqr_matmul",
    "switchback_linear",
    "unmerge_adapter",
]

_find_moved_modules()
_connect_other_libraries()

# Modules that are imported by their first use: the first, because it imports transformers only then.
_LAZY = ("integrations", "reference")
# Names that were here, and where they are now.
_MOVED = {
    "Adapter": "octavo.lora.Adapter",
    "Conversion": "octavo.switchback.Conversion",
    "MergeReport": "octavo.lora.MergeReport",
    "NF4Weight": "octavo.nf4.NF4Weight",
    "QuantizedWeight": "octavo.switchback.QuantizedWeight",
    "Report": "octavo.core.report.Report",
    "csr_to_dense": "octavo.sparse.csr_to_dense",
    "cuda_built": "octavo.core.checks.cuda_built",
    "delete_adapter": "octavo.lora.delete_adapter",
    "dense_to_csr": "octavo.sparse.dense_to_csr",
    "fp8_linear": "octavo.switchback.fp8_linear",
    "int8_linear_train": "octavo.int8.int8_linear_train",
    "list_adapters": "octavo.lora.list_adapters",
    "quantize_once": "octavo.switchback.quantize_once",
    "quantize_weight": "octavo.switchback.switchback_weight",
    "validate_csr": "octavo.sparse.validate_csr",
    **{
        name: f"octavo.ops.{name}"
        for name in (
            *("csr_grad_values", "csr_matmul_add", "csr_matmul_transposed", "extract_columns", "extract_int8_columns"),
            *("find_outlier_columns", "int8_gemm", "int8_linear", "int8_mm", "nf4_dequantize", "nf4_linear"),
            *("nf4_linear_transposed", "nf4_quantize", "optim_step", "optim_sums", "optim_table"),
            *("quantize_columnwise", "quantize_columnwise_transpose", "quantize_rowwise_columnwise"),
            *("quantize_rowwise_columnwise_transpose", "quantize_tensorwise", "quantize_tensorwise_transpose"),
            *("spqr_dequantize", "spqr_linear", "spqr_quantize_columns"),
        )
    },
}


def __getattr__(name: str) -> Any:
    if name == "OctavoConfig":  # importing it imports transformers and registers the quantizer there
        return importlib.import_module(".integrations.transformers", __name__).OctavoConfig
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name in _MOVED:
        module, _, leaf = _MOVED[name].rpartition(".")
        warnings.warn(f"octavo.{name} is {_MOVED[name]} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), leaf)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY})
