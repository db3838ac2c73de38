#include <memory>

#include "cpu/parallel.h"
#include "spqr/tile.h"

namespace octavo::cpu {

int64_t spqr_workspace(const SpqrMatmul&) {
  return 0;
}

namespace {
float weight_at(const SpqrWeight& w, int64_t i, int64_t j) {
  const uint32_t pair = spqr_pair(w.bits, spqr_codes(w, i / 16, j / 32) + i % 16, 16, static_cast<int>(j % 32 / 2));
  const SpqrStatistics s = spqr_statistics(w, i, j / w.group_size);
  return s.scale * (static_cast<float>(pair >> (j % 2 * 16) & 0xffffu) - s.zero);
}
void dequantize_row(const SpqrWeight& w, int64_t i, float* row) {
  for (int64_t j = 0; j < w.k; ++j) row[spqr_source_column(w, j)] = weight_at(w, i, j);
  if (w.row_offsets)
    for (int64_t e = w.row_offsets[i]; e < w.row_offsets[i + 1]; ++e) {
      const SpqrOutlier outlier = spqr_outlier(w, e);
      row[spqr_source_column(w, outlier.column)] += outlier.value;
    }
  for (int64_t j = 0; j < w.k; ++j) row[j] *= *w.unit;
}
}  // namespace

void spqr_matmul(const SpqrMatmul& p, Stream) {
  parallel_for(p.w.n, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> row(new float[p.w.k]);
    for (int64_t i = begin; i < end; ++i) {
      dequantize_row(p.w, i, row.get());
      const float bias = p.bias ? load_float(p.bias, p.bias_dtype, i) : 0.0f;
      dispatch_float(p.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t r = 0; r < p.m; ++r) {
          float sum = 0.0f;
          for (int64_t j = 0; j < p.w.k; ++j)
            sum = fmaf(to_float(static_cast<const T*>(p.x)[r * p.w.k + j]), row[j], sum);
          static_cast<T*>(p.out)[r * p.w.n + i] = from_float<T>(sum + bias);
        }
      });
    }
  });
}

void spqr_dequantize(const SpqrDequantize& p, Stream) {
  parallel_for(p.w.n, row_grain(p.w.k), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> row(new float[p.w.k]);
    for (int64_t i = begin; i < end; ++i) {
      dequantize_row(p.w, i, row.get());
      dispatch_float(p.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t j = 0; j < p.w.k; ++j) static_cast<T*>(p.out)[i * p.w.k + j] = from_float<T>(row[j]);
      });
    }
  });
}

}  // namespace octavo::cpu
