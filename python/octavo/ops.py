"""The operators: one thin function per op, and its fake (shape inference for torch.compile).

Everywhere in int8 ``value = code * scale`` with ``scale = absmax / 127`` in fp32. Activations are fp32, fp16 or bf16
and are read in their own dtype. Any leading dimensions; every GEMM is ``a[m, k] x b[n, k]``. The operators are not
differentiable; the families' functions (`octavo.int8_matmul` and its siblings) compose them into ones that are.

Rows with special values, the same on every backend: a zero row, or one whose absmax is below 2**-120, has codes 0 and
scale 0. A row with a NaN (or an Inf that is not an outlier) has codes 0 and scale NaN, so that everything computed
from it is NaN; no other row is touched.
"""

from __future__ import annotations

from .blockwise.ops import dequantize_blockwise as dequantize_blockwise
from .blockwise.ops import quantize_blockwise as quantize_blockwise
from .core.fakes import register_fakes as register_fakes
from .int8.ops import dequantize_rowwise as dequantize_rowwise
from .int8.ops import extract_columns as extract_columns
from .int8.ops import extract_int8_columns as extract_int8_columns
from .int8.ops import find_outlier_columns as find_outlier_columns
from .int8.ops import int8_gemm as int8_gemm
from .int8.ops import int8_linear as int8_linear
from .int8.ops import int8_mm as int8_mm
from .int8.ops import quantize_columnwise as quantize_columnwise
from .int8.ops import quantize_rowwise as quantize_rowwise
from .int8.ops import quantize_rowwise_columnwise as quantize_rowwise_columnwise
from .int8.ops import quantize_tensorwise as quantize_tensorwise
from .int8.ops_transpose import quantize_columnwise_transpose as quantize_columnwise_transpose
from .int8.ops_transpose import quantize_rowwise_columnwise_transpose as quantize_rowwise_columnwise_transpose
from .int8.ops_transpose import quantize_tensorwise_transpose as quantize_tensorwise_transpose
from .nf4.ops import nf4_dequantize as nf4_dequantize
from .nf4.ops import nf4_linear as nf4_linear
from .nf4.ops import nf4_linear_transposed as nf4_linear_transposed
from .nf4.ops import nf4_quantize as nf4_quantize
from .optim.ops import optim_step as optim_step
from .optim.ops import optim_sums as optim_sums
from .optim.ops import optim_table as optim_table
from .sparse.ops import csr_grad_values as csr_grad_values
from .sparse.ops import csr_matmul as csr_matmul
from .sparse.ops import csr_matmul_add as csr_matmul_add
from .sparse.ops import csr_matmul_transposed as csr_matmul_transposed
from .spqr.ops import spqr_dequantize as spqr_dequantize
from .spqr.ops import spqr_linear as spqr_linear
from .spqr.ops import spqr_quantize_columns as spqr_quantize_columns
