#include "blockwise/blockwise_loops.h"
#include "common/codebook.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace octavo::cpu {
namespace {

const BlockwiseLoops& blockwise_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::blockwise_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::blockwise_loops;
#endif
    default: return portable::blockwise_loops;
  }
}

}  // namespace

void quantize_blocks(const QuantizeBlocks& p, Stream) {
  const BlockwiseLoops& loops = blockwise_loops();
  float own[kCodes - 1];
  if (p.values)
    for (int code = 0; code + 1 < kCodes; ++code) own[code] = threshold_between(p.values[code], p.values[code + 1]);
  const float* thresholds = p.values ? own : nullptr;
  parallel_for(ceil_div(p.count, p.blocksize), row_grain(p.blocksize),
               [&](int64_t begin, int64_t end) { loops.quantize(p, thresholds, begin, end); });
}

void dequantize_blocks(const DequantizeBlocks& p, Stream) {
  const BlockwiseLoops& loops = blockwise_loops();
  parallel_for(ceil_div(p.count, p.blocksize), row_grain(p.blocksize),
               [&](int64_t begin, int64_t end) { loops.dequantize(p, begin, end); });
}

}  // namespace octavo::cpu
