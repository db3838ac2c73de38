// Outlier columns: find, list, extract. The list has a fixed capacity (all columns) and its length stays on the
// device, so nothing here waits for the host, and all of it can be captured in a CUDA graph.
#include "common/launch.h"
#include "common/numeric.h"
#include "common/ptx.h"
#include "common/reduce.h"
#include "common/tile.h"
#include "outlier/compact.h"

namespace octavo::GPU_NS {

// One read of x by tiles. Outliers are rare: a pack is looked at closely only if its largest element might be one.
template <class T, int kWidth>
__global__ void __launch_bounds__(kTileLanes* kTileWarps) outlier_flags_kernel(OutlierFlags p) {
  const Tile<kWidth> tile(p.rows, p.cols);
  if (tile.pack >= tile.packs) return;
  const uint32_t limit = outlier_bits(p.threshold);
  for (int64_t row = tile.row; row < tile.end; row += kTileWarps) {
    const auto x = load_pack<kWidth>(static_cast<const T*>(p.x), row * tile.packs + tile.pack);
    if (absmax_bits(x) < limit) continue;
    UNROLL for (int e = 0; e < kWidth; ++e) {
      if (is_outlier(to_float(x.at[e]), p.threshold)) set_flag(p.flags + tile.pack * kWidth + e);
    }
  }
}

// One block: the flags are a few KiB, and a second launch would cost more than it saves.
__global__ void __launch_bounds__(kCompactThreads) compact_columns_kernel(CompactColumns p) {
  compact_flags(p);
}

// A tile of out per block: the gather from x is scattered, the stores are not.
template <class T>
__global__ void __launch_bounds__(kTileLanes* kTileWarps) extract_columns_kernel(ExtractColumns p) {
  const Tile<1> tile(p.rows, p.capacity);
  const int64_t c = tile.pack;
  if (c >= p.capacity) return;
  const int64_t column = c < *p.count ? p.columns[c] : -1;
  const bool valid = column >= 0 && column < p.cols;
  for (int64_t row = tile.row; row < tile.end; row += kTileWarps) {
    T value{};
    if (valid && p.scale != nullptr)
      value = from_float<T>(static_cast<float>(static_cast<const int8_t*>(p.x)[row * p.cols + column]) * p.scale[row]);
    else if (valid)
      value = static_cast<const T*>(p.x)[row * p.cols + column];
    static_cast<T*>(p.out)[row * p.capacity + c] = value;
  }
}

void outlier_flags(const OutlierFlags& p, Stream stream) {
  if (p.cols == 0) return;
  fill_bytes(p.flags, 0, p.cols, stream);
  if (p.rows == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorWidth<T>;
    const bool vector = packable(static_cast<const T*>(p.x), p.cols, kVector);
    auto kernel = vector ? outlier_flags_kernel<T, kVector> : outlier_flags_kernel<T, 1>;
    const dim3 grid = vector ? Tile<kVector>::grid(p.rows, p.cols) : Tile<1>::grid(p.rows, p.cols);
    LAUNCH(kernel, grid, Tile<1>::block(), 0, stream, p);
  });
}

void compact_columns(const CompactColumns& p, Stream stream) {
  LAUNCH(compact_columns_kernel, dim3(1), dim3(kCompactThreads), 0, stream, p);
}

void extract_columns(const ExtractColumns& p, Stream stream) {
  if (p.rows == 0 || p.capacity == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    auto kernel = extract_columns_kernel<decltype(element)>;
    LAUNCH(kernel, Tile<1>::grid(p.rows, p.capacity), Tile<1>::block(), 0, stream, p);
  });
}

}  // namespace octavo::GPU_NS
