#include <cstring>

#include "common/numeric.h"
#include "cpu/parallel.h"
#include "int8/quantize_loops.h"
#include "outlier/outlier.h"

namespace octavo::cpu {
namespace {

int64_t valid_count(const int32_t* count, int64_t capacity) {
  return *count < capacity ? *count : capacity;
}

template <class In, class Out, class Convert>
void gather(const ExtractColumns& p, const Convert& convert) {
  const int64_t count = valid_count(p.count, p.capacity);
  parallel_for(p.rows, row_grain(p.capacity), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const In* x = static_cast<const In*>(p.x) + i * p.cols;
      Out* out = static_cast<Out*>(p.out) + i * p.capacity;
      for (int64_t c = 0; c < p.capacity; ++c) {
        const bool valid = c < count && p.columns[c] >= 0 && p.columns[c] < p.cols;
        out[c] = valid ? convert(x[p.columns[c]], i) : Out{};
      }
    }
  });
}

}  // namespace

void outlier_flags(const OutlierFlags& p, Stream) {
  std::memset(p.flags, 0, p.cols);
  const QuantizeLoops& loops = quantize_loops();
  const int64_t bytes = p.cols * (p.dtype == DType::f32 ? 4 : 2);
  parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      loops.outlier_flags(static_cast<const char*>(p.x) + i * bytes, p.dtype, p.cols, p.threshold, p.flags);
  });
}

void compact_columns(const CompactColumns& p, Stream) {
  int32_t count = 0;
  for (int64_t j = 0; j < p.cols; ++j)
    if (p.flags[j]) p.columns[count++] = static_cast<int32_t>(j);
  for (int64_t j = count; j < p.cols; ++j) p.columns[j] = -1;
  *p.count = count;
}

void extract_columns(const ExtractColumns& p, Stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.scale)
      gather<int8_t, T>(p,
                        [&](int8_t code, int64_t i) { return from_float<T>(static_cast<float>(code) * p.scale[i]); });
    else
      gather<T, T>(p, [](T v, int64_t) { return v; });
  });
}

}  // namespace octavo::cpu
