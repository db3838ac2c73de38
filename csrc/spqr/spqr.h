#pragma once
#include "common/dtype.h"

namespace octavo {

// A weight [n, k] as SpQR stores it (README.md of this folder says where each bit is; tile.h reads them). Columns are
// in the order of the quantizer: column j of the codes and of the outliers is column perm[j] of the weight.
//   dense[i, j] = s(i, g) * (code[i, j] - z(i, g)),  g = j / group_size
//   weight[i, perm[j]] = unit * (dense[i, j] + value of the outlier at (i, j), if there is one)
// n and k are any; k is a multiple of group_size. Rows are padded to 16, columns to 32: codes there have any value.
struct SpqrWeight {
  int64_t n, k;
  int bits;                    // 2, 3, 4
  int group_size;              // 16, 32, 64: columns that share a scale and a zero point
  const uint32_t* codes;       // [row tiles, chunks, bits, 16]
  const uint8_t* statistics;   // with second_order: [row tiles, groups, 2 * (scale_bits + zero_bits)] bytes; else null
  const Half* plain;           // without: [row tiles, groups, 2, 16], 16 scales then 16 zero points; else null
  const Half* second_order;    // [ceil(n / stats_group_size), groups, 4] or null
  int64_t stats_group_size;    // a multiple of 16: rows that share a second-order record
  int scale_bits, zero_bits;   // 1 to 4
  const float* unit;           // [1], on the device
  const uint32_t* outliers;    // [outliers, 1 or 2] words: narrow: value (fp16) << 16 | column; wide: column, value
  const int32_t* row_offsets;  // [n + 1], of outliers; columns ascend in a row. Null: no outliers
  const void* perm;            // [k] uint16, wide: int32; or null: the identity
  bool wide;                   // k > 65536
};

// out[m, n] = x[m, k] @ weight^T + bias, fp32 accumulation, one rounding.
// Up to kSpqrStreamRows rows of x the weight is streamed once and enters exactly as above, in fp32:
//   sum over groups of s * (sum of code * x - z * (sum of x)), plus the outliers, times unit.
// With more rows it may be rounded to x's dtype first (16-bit products): then it is what spqr_dequantize gives.
constexpr int64_t kSpqrStreamRows = 16;

struct SpqrMatmul {
  SpqrWeight w;
  const void* x;  // [m, k]
  DType dtype;    // of x and out
  int64_t m;
  const void* bias;  // [n] or null
  DType bias_dtype;
  void* out;        // [m, n]
  void* workspace;  // spqr_workspace(p) bytes, 64-byte aligned; null where that is 0
};

// out[n, k] = the weight, in the order of its own columns: fp32 arithmetic, one rounding.
struct SpqrDequantize {
  SpqrWeight w;
  void* out;
  DType dtype;
};

namespace cpu {
int64_t spqr_workspace(const SpqrMatmul&);
void spqr_matmul(const SpqrMatmul&, Stream);
void spqr_dequantize(const SpqrDequantize&, Stream);
}  // namespace cpu
namespace cuda {
int64_t spqr_workspace(const SpqrMatmul&);
void spqr_matmul(const SpqrMatmul&, Stream);
void spqr_dequantize(const SpqrDequantize&, Stream);
}  // namespace cuda
namespace simt {
int64_t spqr_workspace(const SpqrMatmul&);
void spqr_matmul(const SpqrMatmul&, Stream);
void spqr_dequantize(const SpqrDequantize&, Stream);
}  // namespace simt

}  // namespace octavo
