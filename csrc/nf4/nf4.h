#pragma once
#include "common/normal_float.h"
#include "common/numeric.h"

namespace octavo {

// A tensor in one of the low-bit types, as QLoRA (arXiv 2305.14314) stores it: blocks of `blocksize` consecutive
// elements of the flattened tensor, the last one possibly shorter, which may cross its rows; element i belongs to block
// i / blocksize. With double quantization absmax itself is in 8 bits: blocks of 256 of the signed dynamic map, about an
// offset.
//   element i = value[code i] * absmax(i / blocksize), in fp32, rounded once to the dtype asked for
constexpr int64_t kMinLowBitBlock = 32, kMaxLowBitBlock = 4096;  // powers of two
constexpr int64_t kNestedBlock = 256;

struct LowBitTensor {
  QuantType type;
  const uint8_t* packed;  // [packed_bytes(type, count)]
  int64_t count, blocksize;
  const float* absmax;          // [blocks]
  const uint8_t* absmax_codes;  // [blocks]; with them double quantization, and no absmax
  const float* nested_absmax;   // [ceil(blocks / 256)]
  const float* offset;          // [1]
};

// In this order everywhere, so that dequantized values agree to the bit. (On a GPU the map is in other memory.)
inline float low_bit_absmax(const LowBitTensor& t, int64_t block) {
  if (t.absmax_codes == nullptr) return t.absmax[block];
  return kSignedMap.value[t.absmax_codes[block]] * t.nested_absmax[block / kNestedBlock] + *t.offset;
}

// absmax[b] = block_absmax(largest finite |x| of the block); codes as small_block_code says, and block_code for nf8.
struct QuantizeLowBit {
  const void* x;  // [count]
  DType dtype;
  QuantType type;
  uint8_t* packed;
  float* absmax;
  int64_t count, blocksize;
};

struct DequantizeLowBit {
  LowBitTensor from;
  void* out;  // [count]
  DType dtype;
};

// The weight is [n, k], flattened.
//   nf4_matmul:            out[m, n] = x[m, k] @ weight^T + bias
//   nf4_matmul_transposed: out[m, k] = x[m, n] @ weight            (no bias)
// Sums in fp32, one rounding. With 16-bit x the weight, or the values of its code book (product_value), may be rounded
// to x's dtype first: one or the other, never both. In the second case codes are added up before absmax multiplies
// them: on a GPU bf16 x from about 2^110 on may then overflow where the product would not.
struct Nf4Matmul {
  LowBitTensor w;
  int64_t n, k;
  const void* x;
  DType dtype;  // of x and out
  int64_t m;
  const void* bias;  // [n] or null
  DType bias_dtype;
  void* out;
  void* workspace;  // nf4_workspace(p) bytes (nf4_workspace_transposed), 64-byte aligned; null where that is 0
};

#define OCTAVO_NF4_KERNELS                                  \
  void quantize_low_bit(const QuantizeLowBit&, Stream);     \
  void dequantize_low_bit(const DequantizeLowBit&, Stream); \
  int64_t nf4_workspace(const Nf4Matmul&);                  \
  void nf4_matmul(const Nf4Matmul&, Stream);                \
  int64_t nf4_workspace_transposed(const Nf4Matmul&);       \
  void nf4_matmul_transposed(const Nf4Matmul&, Stream);
namespace cpu {
OCTAVO_NF4_KERNELS
}
namespace cuda {
OCTAVO_NF4_KERNELS
}
namespace simt {
OCTAVO_NF4_KERNELS
}
#undef OCTAVO_NF4_KERNELS

}  // namespace octavo
