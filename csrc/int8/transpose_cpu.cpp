#include <memory>

#include "common/numeric.h"
#include "common/random.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "int8/transpose_loops.h"

namespace octavo::cpu {
namespace {

const TransposeLoops& transpose_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::transpose_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::transpose_loops;
#endif
    default: return portable::transpose_loops;
  }
}

}  // namespace

void encode_transposed(const EncodeTransposed& p, Stream) {
  const int64_t scales = p.absmax_stride ? p.cols : 1;
  const std::unique_ptr<float[]> inverse(new float[scales]);
  for (int64_t j = 0; j < scales; ++j) {
    p.scale[j] = scale_of(p.absmax[j]);
    inverse[j] = inverse_scale_of(p.absmax[j]);
  }
  const TransposeLoops& loops = transpose_loops();
  const uint32_t key = p.seed ? mix_seed(static_cast<uint64_t>(*p.seed)) : 0;
  const int64_t across = ceil_div(p.cols, kTransposeCols), down = ceil_div(p.rows, kTransposeRows);
  const int64_t grain = ceil_div(kElementGrain, kTransposeRows * kTransposeCols);
  parallel_for(across * down, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int8_t[]> codes(new int8_t[kTransposeRows * kTransposeStride]);
    for (int64_t t = begin; t < end; ++t)
      loops.tile(p, t / across * kTransposeRows, t % across * kTransposeCols, inverse.get(), key, codes.get());
  });
}

}  // namespace octavo::cpu
