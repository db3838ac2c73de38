"""The operators in plain PyTorch: same names, same signatures, float64 where the result is a float.

Codes, scales and integers are exact (the operators must give the same bits); products are float64 (the operators must
be as close to them as fp32 accumulation allows). Slow, and meant to be read.
"""

from __future__ import annotations

from .blockwise.maps import dynamic_map as dynamic_map
from .blockwise.maps import thresholds as thresholds
from .blockwise.reference import dequantize_blockwise as dequantize_blockwise
from .blockwise.reference import quantize_blockwise as quantize_blockwise
from .core.hashing import mix_bits as mix_bits
from .int8.reference import dequantize_rowwise as dequantize_rowwise
from .int8.reference import extract_columns as extract_columns
from .int8.reference import extract_int8_columns as extract_int8_columns
from .int8.reference import find_outlier_columns as find_outlier_columns
from .int8.reference import int8_gemm as int8_gemm
from .int8.reference import int8_linear as int8_linear
from .int8.reference import int8_mm as int8_mm
from .int8.reference import quantize_columnwise as quantize_columnwise
from .int8.reference import quantize_columnwise_transpose as quantize_columnwise_transpose
from .int8.reference import quantize_rowwise as quantize_rowwise
from .int8.reference import quantize_rowwise_columnwise as quantize_rowwise_columnwise
from .int8.reference import quantize_rowwise_columnwise_transpose as quantize_rowwise_columnwise_transpose
from .int8.reference import quantize_tensorwise as quantize_tensorwise
from .int8.reference import quantize_tensorwise_transpose as quantize_tensorwise_transpose
from .nf4.reference import code_book as code_book
from .nf4.reference import nf4_dequantize as nf4_dequantize
from .nf4.reference import nf4_linear as nf4_linear
from .nf4.reference import nf4_linear_transposed as nf4_linear_transposed
from .nf4.reference import nf4_quantize as nf4_quantize
from .nf4.reference import normal_float as normal_float
from .optim.reference import optim_step as optim_step
from .optim.reference import optim_sums as optim_sums
from .optim.reference import optim_table as optim_table
from .sparse.reference import csr_grad_values as csr_grad_values
from .sparse.reference import csr_matmul as csr_matmul
from .sparse.reference import csr_matmul_add as csr_matmul_add
from .sparse.reference import csr_matmul_transposed as csr_matmul_transposed
from .spqr.reference import spqr_dequantize as spqr_dequantize
from .spqr.reference import spqr_linear as spqr_linear
from .spqr.reference import spqr_quantize_columns as spqr_quantize_columns
