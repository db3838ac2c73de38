"""Products with sparse matrices in compressed rows."""

from .formats import csr_to_dense, dense_to_csr, validate_csr
from .functional import csr_matmul

__all__ = ["csr_matmul", "csr_to_dense", "dense_to_csr", "validate_csr"]
