// Outlier columns and int8 codes of x: in one launch where x is small, as in decoding, when launches are what it costs.
#include "common/launch.h"
#include "common/numeric.h"
#include "common/reduce.h"
#include "common/tile.h"
#include "int8/decompose.h"
#include "int8/pack.h"
#include "int8/quantize.h"
#include "outlier/compact.h"

namespace octavo::GPU_NS {

// Up to here one block should be faster than the launches that it saves (an estimate): at some 33 instructions for an
// element, of which a multiprocessor issues 128 a clock, 16384 elements take about 4000 clocks, three launches and a
// fill about twice that. A thread walks down the rows of its columns, so there must be few.
constexpr int64_t kSmallDecompose = 1 << 14;  // elements of x
constexpr int64_t kFewRows = 16;

template <class T, int kWidth>
__global__ void __launch_bounds__(kCompactThreads) decompose_kernel(Decompose p) {
  SHARED(uint32_t, warp_absmax, [kMaxWarps]);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const T* x = static_cast<const T*>(p.x);
  const int rows = static_cast<int>(p.rows), packs = static_cast<int>(p.cols) / kWidth;  // small, by the launcher

  // Columns: a thread takes a pack of them in all rows.
  const uint32_t limit = outlier_bits(p.threshold);
  NO_UNROLL for (int pack = thread; pack < packs; pack += kCompactThreads) {
    Pack<uint8_t, kWidth> found{};
    for (int row = 0; row < rows; ++row) {
      const auto values = load_pack<kWidth>(x, row * packs + pack);
      if (absmax_bits(values) < limit) continue;
      UNROLL for (int e = 0; e < kWidth; ++e) {
        if (is_outlier(to_float(values.at[e]), p.threshold)) found.at[e] = 1;
      }
    }
    store_pack(p.flags, pack, found);
  }
  __syncthreads();
  compact_flags({p.flags, p.columns, p.count, p.cols});

  // Rows: the warps are dealt out evenly, each row to the same power of two of them.
  int warps = kMaxWarps;
  while (warps > 1 && kMaxWarps / warps < rows) warps /= 2;
  const int part = warp % warps, rows_at_once = kMaxWarps / warps;
  NO_UNROLL for (int row0 = 0; row0 < rows; row0 += rows_at_once) {
    const int row = row0 + warp / warps;
    uint32_t absmax = 0;
    if (row < rows) {
      for (int pack = part * 32 + lane; pack < packs; pack += warps * 32) {
        const uint32_t bits = absmax_bits(load_kept<true, kWidth>(p.flags, x, row * packs, pack));
        absmax = bits > absmax ? bits : absmax;
      }
    }
    absmax = warp_max(absmax);
    __syncthreads();  // the maxima of the rows before have been read
    if (lane == 0) warp_absmax[warp] = absmax;
    __syncthreads();
    absmax = warp_max(lane < warps ? warp_absmax[warp - part + lane] : 0);
    if (row >= rows) continue;  // a whole warp, which still meets the others' barriers
    if (part == 0 && lane == 0) p.scale[row] = scale_of(absmax);
    const float inverse = inverse_scale_of(absmax);
    for (int pack = part * 32 + lane; pack < packs; pack += warps * 32) {
      const auto kept = load_kept<true, kWidth>(p.flags, x, row * packs, pack);
      store_pack(p.codes, row * packs + pack, encode_pack(kept, inverse));
    }
  }
}

void decompose(const Decompose& p, Stream stream) {
  if (p.cols > 0 && p.cols <= kSmallDecompose && p.rows <= kFewRows && p.rows * p.cols <= kSmallDecompose) {
    return dispatch_float(p.dtype, [&](auto element) {
      using T = decltype(element);
      constexpr int kVector = kVectorWidth<T>;
      const bool vector = packable(static_cast<const T*>(p.x), p.cols, kVector);
      auto kernel = vector ? decompose_kernel<T, kVector> : decompose_kernel<T, 1>;
      LAUNCH(kernel, dim3(1), dim3(kCompactThreads), 0, stream, p);
    });
  }
  outlier_flags({p.x, p.dtype, p.flags, p.threshold, p.rows, p.cols}, stream);
  compact_columns({p.flags, p.columns, p.count, p.cols}, stream);
  quantize_rows({p.x, p.dtype, p.codes, p.scale, p.flags, 0.0f, p.rows, p.cols}, stream);
}

}  // namespace octavo::GPU_NS
