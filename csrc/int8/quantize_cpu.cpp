#include <cstring>
#include <memory>

#include "common/numeric.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "int8/quantize_loops.h"

namespace octavo::cpu {
namespace {

const char* element(const void* x, DType dtype, int64_t i) {
  return static_cast<const char*>(x) + i * (dtype == DType::f32 ? 4 : 2);
}

// The maximum of what all threads found: its result does not depend on their order.
void raise(uint32_t* most, uint32_t value) {
  uint32_t seen = __atomic_load_n(most, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(most, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace

const QuantizeLoops& quantize_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::quantize_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::quantize_loops;
#endif
    default: return portable::quantize_loops;
  }
}

void quantize_rows(const QuantizeRows& p, Stream) {
  const QuantizeLoops& loops = quantize_loops();
  parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) { loops.rows(p, begin, end); });
}

void quantize_columns(const QuantizeColumns& p, Stream) {
  const QuantizeLoops& loops = quantize_loops();
  std::memset(p.absmax, 0, p.cols * sizeof(uint32_t));
  const QuantizeRows by_row{p.x, p.dtype, p.row_codes, p.row_scale, nullptr, 0.0f, p.rows, p.cols};
  parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> mine(new uint32_t[p.cols]());
    for (int64_t i = begin; i < end; ++i) {
      if (p.row_scale) loops.rows(by_row, i, i + 1);
      loops.column_absmax(element(p.x, p.dtype, i * p.cols), p.dtype, p.cols, mine.get());
    }
    for (int64_t j = 0; j < p.cols; ++j) raise(p.absmax + j, mine[j]);
  });
  if (!p.scale) return;
  const std::unique_ptr<float[]> inverse(new float[p.cols]);
  for (int64_t j = 0; j < p.cols; ++j) {
    p.scale[j] = scale_of(p.absmax[j]);
    inverse[j] = inverse_scale_of(p.absmax[j]);
  }
  parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      loops.encode_row(element(p.x, p.dtype, i * p.cols), p.dtype, p.cols, inverse.get(), 1, p.codes + i * p.cols);
  });
}

void quantize_tensor(const QuantizeTensor& p, Stream) {
  const QuantizeLoops& loops = quantize_loops();
  *p.absmax = 0;
  parallel_for(p.count, kElementGrain, [&](int64_t begin, int64_t end) {
    uint32_t mine = 0;
    loops.absmax(element(p.x, p.dtype, begin), p.dtype, end - begin, &mine);
    raise(p.absmax, mine);
  });
  if (!p.scale) return;
  *p.scale = scale_of(*p.absmax);
  const float inverse = inverse_scale_of(*p.absmax);
  parallel_for(p.count, kElementGrain, [&](int64_t begin, int64_t end) {
    loops.encode_row(element(p.x, p.dtype, begin), p.dtype, end - begin, &inverse, 0, p.codes + begin);
  });
}

void dequantize_rows(const DequantizeRows& p, Stream) {
  const QuantizeLoops& loops = quantize_loops();
  parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) { loops.dequantize(p, begin, end); });
}

}  // namespace octavo::cpu
