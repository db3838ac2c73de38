#pragma once
#include "common/dtype.h"

namespace octavo {

// The mixed-precision decomposition of LLM.int8() (arXiv 2208.07339, section 3.2): which columns of x hold an outlier,
// and the rest of x in int8. The same as outlier_flags, compact_columns and quantize_rows with skip = flags, in a row:
// whole columns are left out of the rows' absmax, not only the elements above the threshold, which is what keeps the
// scales of the other columns small.
struct Decompose {
  const void* x;  // [rows, cols]
  DType dtype;
  float threshold;   // > 0
  uint8_t* flags;    // [cols]
  int32_t* columns;  // [cols]: ascending, then -1
  int32_t* count;    // [1]
  int8_t* codes;     // [rows, cols]
  float* scale;      // [rows]
  int64_t rows, cols;
};

namespace cpu {
void decompose(const Decompose&, Stream);
}
namespace cuda {
void decompose(const Decompose&, Stream);
}
namespace simt {
void decompose(const Decompose&, Stream);
}

}  // namespace octavo
