#pragma once
#include "common/dtype.h"

namespace octavo {

// The operands of products along the rows of x, which are rows of its transpose:
//   transposed[j, i] = encode(x[i, j], inverse of absmax[j * absmax_stride])
// and the scales. Where codes is not null, codes[i, j] = transposed[j, i], too: one look at x gives both. The absmax is
// that of quantize_columns or quantize_tensor.
//
// With a seed, codes are rounded at random, the nearer the likelier: encode_at_random(x[i, j], inverse,
// element_bits(row_key(mix_seed(*seed), i), j)).
struct EncodeTransposed {
  const void* x;  // [rows, cols]
  DType dtype;
  const uint32_t* absmax;  // [cols], or [1] where the stride is 0: abs_bits
  int64_t absmax_stride;
  int8_t* codes;        // [rows, cols] or null
  int8_t* transposed;   // [cols, rows]
  float* scale;         // [cols] or [1]
  const int64_t* seed;  // [1] or null
  int64_t rows, cols;
};

namespace cpu {
void encode_transposed(const EncodeTransposed&, Stream);
}
namespace cuda {
void encode_transposed(const EncodeTransposed&, Stream);
}
namespace simt {
void encode_transposed(const EncodeTransposed&, Stream);
}

}  // namespace octavo
