#pragma once
#include "common/dtype.h"

namespace octavo {

// out[i, j] = v, computed in fp32 in this order (numeric.h):
//   v = scale_row(sum_k a[i, k] * b[j, k], first)
//   v = fmaf(x[i, c], float(b[j, c]), v)                        for each outlier column c whose weights were not kept
//   v = scale_column(v, last * b_scale[j], bias[j])
//   v = fmaf(x[i, c], outlier_weight[outlier_slot[c], j], v)    for each c with 0 <= outlier_slot[c] < outlier_slots
// where first, last are a_scale[i], 1 with x, and 1, a_scale[i] without: then scales of any size will do whose product
// is in range. With x they are small, since what reaches the threshold is in the outlier columns. Or, with out_dtype
// i32, the integer sum itself, which is exact for k <= kMaxK; the op checks that. One accumulator carries everything,
// so that outlier columns cost no registers.
//
// The outlier columns (x not null) are columns[0 .. *count), ascending; the caller has set a[:, c] to 0 for them.
// Tensor cores add the products of 16-bit x and weights in groups: equal to these chains up to fp32 rounding.
struct Int8Gemm {
  const int8_t *a, *b;             // [m, k], [n, k]
  const float *a_scale, *b_scale;  // [m] and [n], or [1] where the stride is 0; null with out_dtype i32
  int64_t a_scale_stride, b_scale_stride;
  const void* bias;  // [n] or null
  DType bias_dtype;
  void* out;  // [m, n]
  DType out_dtype;
  int64_t m, n, k;

  const void* x;                   // [m, k] of out_dtype, or null
  const int32_t *columns, *count;  // [k], [1]; *count is read on the device
  const int32_t* outlier_slot;     // [k] or null: the row of outlier_weight; outside [0, outlier_slots): not kept
  const void* outlier_weight;      // [slots, n]
  DType outlier_weight_dtype;
  int64_t outlier_slots;
};

// 128 * 128 * kMaxK < 2^31: no partial sum of int8 products leaves int32.
constexpr int64_t kMaxK = 131071;

namespace cpu {
void int8_gemm(const Int8Gemm&, Stream);
}
namespace cuda {
void int8_gemm(const Int8Gemm&, Stream);
}
namespace simt {
void int8_gemm(const Int8Gemm&, Stream);
}

}  // namespace octavo
