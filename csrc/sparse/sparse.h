#pragma once
#include "common/numeric.h"

namespace octavo {

// S[n, k] in compressed rows: entry e of row i, offsets[i] <= e < offsets[i + 1], is values[e] at columns[e]. Columns
// ascend within a row; equal ones add up. What is not stored does not exist: NaN and Inf of x meet stored entries only.
//
// Whatever the tensors hold, nothing outside them is touched: an offset counts as the nearest in [0, nnz], an entry
// whose column is not in [0, k) adds nothing. Columns that do not ascend are no trouble but to csr_matmul_transposed on
// a GPU, which may leave entries out.
struct Csr {
  const void* values;   // [nnz]; null where the product needs none
  DType dtype;          // of values
  const void* columns;  // [nnz], uint16 where narrow, else int32
  const void* offsets;  // [n + 1], int64 where wide, else int32
  bool narrow, wide;
  int64_t n, k, nnz;
};

HD int64_t csr_offset(const Csr& s, int64_t i) {
  const int64_t offset = s.wide ? static_cast<const int64_t*>(s.offsets)[i] : static_cast<const int32_t*>(s.offsets)[i];
  return offset < 0 ? 0 : offset > s.nnz ? s.nnz : offset;
}

// The column of entry e, which is at least k where it names none.
HD uint32_t csr_column(const Csr& s, int64_t e) {
  return s.narrow ? static_cast<const uint16_t*>(s.columns)[e] : static_cast<const uint32_t*>(s.columns)[e];
}

// The first row whose entries start at e or later; n where there is none.
HD int64_t csr_first_row(const Csr& s, int64_t e) {
  int64_t low = 0, high = s.n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (csr_offset(s, middle) < e)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Work is cut into chunks of equally many entries, wherever rows begin: chunk c has the entries [c * size, (c + 1) *
// size) and the rows that begin there, the last chunk also those that begin at nnz. A row that goes on in later chunks
// is summed from its pieces, in order. The size depends on the shape only, so the result does not depend on threads.
struct CsrChunk {
  int64_t begin, end;       // entries
  int64_t first_row, rows;  // rows that begin here: [first_row, rows)
  int64_t head_end;         // [begin, head_end) ends or continues the row before first_row; mostly empty
  bool open;                // whether row rows - 1 goes on in the next chunk
};

HD int64_t csr_chunks(int64_t nnz, int64_t size) {
  return nnz > size ? ceil_div(nnz, size) : 1;
}

HD CsrChunk csr_chunk(const Csr& s, int64_t chunk, int64_t size) {
  const bool last = chunk + 1 >= csr_chunks(s.nnz, size);
  CsrChunk c;
  c.begin = chunk * size;
  c.end = last ? s.nnz : c.begin + size;
  c.first_row = chunk == 0 ? 0 : csr_first_row(s, c.begin);
  c.rows = last ? s.n : csr_first_row(s, c.end);
  const int64_t start = csr_offset(s, c.first_row);
  c.head_end = chunk == 0 ? c.begin : start < c.end ? start : c.end;
  c.open = c.rows > c.first_row && csr_offset(s, c.rows) > c.end;
  return c;
}

// The entries of row i that lie in a chunk: all of them unless it is the last row of an open one. Offsets that do not
// ascend make rows short, never long.
HD int64_t csr_row_end(const Csr& s, int64_t i, const CsrChunk& c) {
  const int64_t end = csr_offset(s, i + 1);
  return end > c.end ? c.end : end;
}

// out[j, i] = sum_e values[e] x[j, columns[e]] (+ bias[i]) (+ out[j, i] where add), e over row i; in fp32, rounded
// once.
struct CsrMatmul {
  Csr s;
  const void* x;  // [m, k]
  DType x_dtype;
  const void* bias;  // [n] or null
  DType bias_dtype;
  bool add;
  void* out;  // [m, n]
  DType out_dtype;
  int64_t m;
  void* workspace;  // csr_matmul_workspace() bytes
};

// out[j, c] = sum_e values[e] g[j, i], e over all rows i where columns[e] = c, in the order of rows: g @ S.
struct CsrMatmulTransposed {
  Csr s;
  const void* g;  // [m, n]
  DType dtype;    // of g and out
  void* out;      // [m, k]
  int64_t m;
  void* workspace;
};

// out[e] = sum_j g[j, i] x[j, columns[e]], e in row i: the gradient of csr_matmul's values. 0 where a column or row is
// none.
struct CsrGradValues {
  Csr s;          // values null
  const void* g;  // [m, n]
  const void* x;  // [m, k]
  DType dtype;    // of g and x
  void* out;      // [nnz]
  DType out_dtype;
  int64_t m;
  void* workspace;
};

HD void store_float(void* data, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::f16: static_cast<Half*>(data)[i] = from_float<Half>(v); return;
    case DType::bf16: static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(v); return;
    default: static_cast<float*>(data)[i] = v;
  }
}

// Writes out[j, i] from its sum.
HD void csr_finish(const CsrMatmul& p, int64_t j, int64_t i, float sum) {
  const int64_t at = j * p.s.n + i;
  if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, i);
  if (p.add) sum += load_float(p.out, p.out_dtype, at);
  store_float(p.out, p.out_dtype, at, sum);
}

#define OCTAVO_SPARSE_KERNELS                                     \
  int64_t csr_matmul_workspace(const CsrMatmul&);                 \
  int64_t csr_transposed_workspace(const CsrMatmulTransposed&);   \
  int64_t csr_grad_values_workspace(const CsrGradValues&);        \
  void csr_matmul(const CsrMatmul&, Stream);                      \
  void csr_matmul_transposed(const CsrMatmulTransposed&, Stream); \
  void csr_grad_values(const CsrGradValues&, Stream);
namespace cpu {
OCTAVO_SPARSE_KERNELS
}
namespace cuda {
OCTAVO_SPARSE_KERNELS
}
namespace simt {
OCTAVO_SPARSE_KERNELS
}
#undef OCTAVO_SPARSE_KERNELS

}  // namespace octavo
