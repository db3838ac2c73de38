#pragma once
#include "common/dtype.h"

namespace octavo {

// One block of columns of SpQR's quantization (2306.03078, Algorithm 1), and of GPTQ's and round-to-nearest's, which
// are special cases. Rows are independent but for the statistics of two levels, which `stats_rows` rows share.

constexpr int64_t kMaxBlockColumns = 128;
constexpr int64_t kMaxStatsRows = 1024;

struct SpqrColumns {
  const float* weight;  // [n, k], with the errors of all columns before this block in it
  const float* factor;  // [k, k], the block of U on the diagonal, upper: the inverse Hessian is U^T U
  uint8_t* codes;       // [n, k]
  // Of two levels (scale_bits > 0): codes uint8 [n, groups] and half [ceil(n / stats_rows), groups, 4], which is scale
  // and zero of the scales, scale and zero of the zeros. Of one level: half [n, groups], and no second_order.
  void *scales, *zeros;
  Half* second_order;
  Half* residual;      // [n, k]: what an outlier adds to the dense value; 0: not an outlier
  float* error;        // [n, k]: (weight - result) / U_jj, for the columns after this block
  float threshold;     // of squared errors, above which a weight is an outlier; Inf: none is
  bool leave_one_out;  // fit a group without the weights whose removal gains more than the threshold
  int bits, scale_bits, zero_bits;
  int64_t n, k, group_size, stats_rows;
};

#define OCTAVO_SPQR_COLUMNS void spqr_columns(const SpqrColumns&, Stream);
namespace cpu {
OCTAVO_SPQR_COLUMNS
}
namespace simt {
OCTAVO_SPQR_COLUMNS
}
#undef OCTAVO_SPQR_COLUMNS

}  // namespace octavo
