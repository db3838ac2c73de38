#pragma once
#include "common/dtype.h"

namespace octavo {

// flags[j] = 1 where any |x[i, j]| >= threshold, else 0 (NaN is not an outlier, Inf is).
struct OutlierFlags {
  const void* x;  // [rows, cols]
  DType dtype;
  uint8_t* flags;   // [cols], the kernel writes all of it
  float threshold;  // > 0
  int64_t rows, cols;
};

// columns = ascending j with flags[j] != 0, then -1; count = how many. A prefix sum: the order never depends on timing.
struct CompactColumns {
  const uint8_t* flags;  // [cols]
  int32_t* columns;      // [cols]
  int32_t* count;        // [1]
  int64_t cols;
};

// out[i, c] = x[i, columns[c]] for c < min(*count, capacity) and a valid column, else 0.
// With scale (x is int8): out[i, c] = x[i, columns[c]] * scale[i].
struct ExtractColumns {
  const void* x;           // [rows, cols], out's dtype; int8 when scale is given
  const float* scale;      // [rows] or null
  const int32_t* columns;  // [capacity]
  const int32_t* count;    // [1]
  void* out;               // [rows, capacity]
  DType dtype;             // of out
  int64_t rows, cols, capacity;
};

#define OCTAVO_OUTLIER_KERNELS                         \
  void outlier_flags(const OutlierFlags&, Stream);     \
  void compact_columns(const CompactColumns&, Stream); \
  void extract_columns(const ExtractColumns&, Stream);
namespace cpu {
OCTAVO_OUTLIER_KERNELS
}
namespace cuda {
OCTAVO_OUTLIER_KERNELS
}
namespace simt {
OCTAVO_OUTLIER_KERNELS
}
#undef OCTAVO_OUTLIER_KERNELS

}  // namespace octavo
