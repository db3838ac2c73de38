#pragma once
#include "common/dtype.h"

namespace octavo {

// All tensors are contiguous and row-major; x is read in its own dtype; the arithmetic is common/numeric.h.

// codes[i, j] = encode(x[i, j], 127 / absmax_i), scale[i] = absmax_i / 127. Elements with |x| >= threshold (where it is
// positive) and those in columns with skip[j] != 0 are left out of the absmax and coded 0.
struct QuantizeRows {
  const void* x;  // [rows, cols]
  DType dtype;
  int8_t* codes;        // [rows, cols]
  float* scale;         // [rows]
  const uint8_t* skip;  // [cols] or null
  float threshold;      // 0: none
  int64_t rows, cols;
};

// Columns, and rows and columns together. Without scale (null) the columns' absmax is all that is wanted of them:
// encode_transposed makes the rest of it. So for a tensor.
struct QuantizeColumns {
  const void* x;  // [rows, cols]
  DType dtype;
  int8_t* codes;      // [rows, cols], by the column's scale
  float* scale;       // [cols] or null
  uint32_t* absmax;   // [cols]: abs_bits
  int8_t* row_codes;  // [rows, cols] by the row's scale, or null
  float* row_scale;   // [rows] or null: only the columns' codes are wanted (row_codes is null for cols = 0 too)
  int64_t rows, cols;
};

struct QuantizeTensor {
  const void* x;  // [count]
  DType dtype;
  int8_t* codes;     // [count]
  float* scale;      // [1] or null
  uint32_t* absmax;  // [1]: abs_bits
  int64_t count;
};

// out[i, j] = codes[i, j] * scale[i]
struct DequantizeRows {
  const int8_t* codes;  // [rows, cols]
  const float* scale;   // [rows]
  void* out;            // [rows, cols]
  DType dtype;
  int64_t rows, cols;
};

#define OCTAVO_QUANTIZE_KERNELS                          \
  void quantize_rows(const QuantizeRows&, Stream);       \
  void quantize_columns(const QuantizeColumns&, Stream); \
  void quantize_tensor(const QuantizeTensor&, Stream);   \
  void dequantize_rows(const DequantizeRows&, Stream);
namespace cpu {
OCTAVO_QUANTIZE_KERNELS
}
namespace cuda {
OCTAVO_QUANTIZE_KERNELS
}
namespace simt {
OCTAVO_QUANTIZE_KERNELS
}
#undef OCTAVO_QUANTIZE_KERNELS

}  // namespace octavo
