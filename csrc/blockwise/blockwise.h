#pragma once
#include "common/dtype.h"

namespace octavo {

// Blocks of `blocksize` consecutive elements of the flattened tensor, the last one possibly shorter; element i belongs
// to block i / blocksize. Arithmetic: common/codebook.h.

constexpr int64_t kMinBlocksize = 64, kMaxBlocksize = 4096;  // powers of two

// absmax[b] = block_absmax(largest finite |x| of the block), codes[i] = block_code(x[i], block_inverse(absmax[b])).
struct QuantizeBlocks {
  const void* x;  // [count]
  DType dtype;
  const float* values;  // [256] of a code book of the caller's, ascending; null: the dynamic map
  bool is_signed;       // which dynamic map
  uint8_t* codes;       // [count]
  float* absmax;        // [ceil(count / blocksize)]
  int64_t count, blocksize;
};

// out[i] = value[codes[i]] * absmax[b]
struct DequantizeBlocks {
  const uint8_t* codes;  // [count]
  const float* absmax;   // [ceil(count / blocksize)]
  const float* values;   // [256] of a code book of the caller's; null: the dynamic map
  bool is_signed;        // which dynamic map
  void* out;             // [count]
  DType dtype;
  int64_t count, blocksize;
};

#define OCTAVO_BLOCKWISE_KERNELS                       \
  void quantize_blocks(const QuantizeBlocks&, Stream); \
  void dequantize_blocks(const DequantizeBlocks&, Stream);
namespace cpu {
OCTAVO_BLOCKWISE_KERNELS
}
namespace cuda {
OCTAVO_BLOCKWISE_KERNELS
}
namespace simt {
OCTAVO_BLOCKWISE_KERNELS
}
#undef OCTAVO_BLOCKWISE_KERNELS

}  // namespace octavo
