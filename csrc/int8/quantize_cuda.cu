// int8 quantization of rows, columns and tensors, and back. All of it is bound by memory: the aim is one 16-byte
// access per thread and pack, every byte of x read as few times as the result allows, and few instructions per element.
// A maximum does not depend on the order it is taken in, so every kernel here is deterministic, atomics included.
#include <type_traits>

#include "common/launch.h"
#include "common/numeric.h"
#include "common/reduce.h"
#include "common/tile.h"
#include "int8/pack.h"
#include "int8/quantize.h"

namespace octavo::GPU_NS {

// Clears the outliers of a pack; returns the absmax of what is left.
template <class T, int N>
__device__ inline uint32_t drop_outliers(Pack<T, N>& x, float threshold) {
  UNROLL for (int e = 0; e < N; ++e) {
    if (is_outlier(to_float(x.at[e]), threshold)) x.at[e] = T{};
  }
  return absmax_bits(x);
}

// ---- rows ----
//
// A row belongs to one warp (up to 512 columns) or one block (up to 1024 threads), 16 elements per thread: the row is
// read once and stays in registers between the maximum and the codes. At up to 64 registers an SM holds 1024 threads,
// which have 32 KiB of a 16-bit x in flight: enough to cover the latency of memory. Columns beyond 16384 are read a
// second time, from L2. Traffic: sizeof(T) + 1 bytes per element. Without a vector path (odd sizes, unaligned views)
// the same code moves single elements.
//
// kColumns: the maxima of the thread's own columns, over all the rows that it meets, are kept in registers too and
// leave as one atomic per column and block.

template <int kWidth>
constexpr int kRowElements = kWidth == 1 ? 8 : 16;  // per thread; single elements cost more registers each
template <bool kColumns>
constexpr int kRowThreads = kColumns ? 768 : 1024;  // at most, per row; the columns' maxima need registers, too
constexpr int kWarpRows = 8;                        // rows per block when a warp takes a row
constexpr int64_t kRowBlocks = 1 << 14;             // at most: several waves on any GPU; then blocks take further rows

template <class T, int kWidth, bool kColumns, bool kSkip>
__global__ void __launch_bounds__(kRowThreads<kColumns>) quantize_rows_kernel(QuantizeRows p, uint32_t* column_absmax) {
  constexpr int kPacks = kRowElements<kWidth> / kWidth;
  SHARED(uint32_t, scratch, [2][kMaxWarps]);
  const T* x = static_cast<const T*>(p.x);
  const int64_t packs = p.cols / kWidth;
  const uint32_t limit = outlier_bits(p.threshold);
  const unsigned resident = packs < kPacks * blockDim.x ? static_cast<unsigned>(packs) : kPacks * blockDim.x;
  uint32_t column_max[kColumns ? kPacks * kWidth : 1] = {};
  int phase = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t start = row * packs;  // of the row, in packs

    // Past the end a thread repeats the last pack, which changes no maximum and costs less than zeros would.
    Pack<T, kWidth> kept[kPacks];
    unsigned at[kPacks];
    UNROLL for (int i = 0; i < kPacks; ++i) {
      at[i] = threadIdx.x + i * blockDim.x;
      if (at[i] >= resident) at[i] = resident - 1;
      kept[i] = load_kept<kSkip, kWidth>(p.skip, x, start, at[i]);
    }
    uint32_t absmax = 0;
    UNROLL for (int i = 0; i < kPacks; ++i) {
      uint32_t bits = absmax_bits(kept[i]);
      if (bits >= limit) bits = drop_outliers(kept[i], p.threshold);
      absmax = bits > absmax ? bits : absmax;
      if constexpr (kColumns) {
        UNROLL for (int e = 0; e < kWidth; ++e) {
          const uint32_t element = abs_bits(to_float(kept[i].at[e]));
          if (element > column_max[i * kWidth + e]) column_max[i * kWidth + e] = element;
        }
      }
    }
    NO_UNROLL for (int64_t pack = threadIdx.x + kPacks * blockDim.x; pack < packs; pack += blockDim.x) {
      auto again = load_kept<kSkip, kWidth>(p.skip, x, start, pack);
      uint32_t bits = absmax_bits(again);
      if (bits >= limit) bits = drop_outliers(again, p.threshold);
      absmax = bits > absmax ? bits : absmax;
    }

    absmax = blockDim.x == 32 ? warp_max(absmax) : block_max(absmax, scratch[phase]);
    phase ^= 1;
    if (threadIdx.x == 0) p.scale[row] = scale_of(absmax);
    const float inverse = inverse_scale_of(absmax);

    UNROLL for (int i = 0; i < kPacks; ++i) {
      const unsigned pack = threadIdx.x + i * blockDim.x;
      if (pack < resident) store_pack(p.codes, start + pack, encode_pack(kept[i], inverse));
    }
    NO_UNROLL for (int64_t pack = threadIdx.x + kPacks * blockDim.x; pack < packs; pack += blockDim.x) {
      auto again = load_kept<kSkip, kWidth>(p.skip, x, start, pack);
      if (absmax_bits(again) >= limit) drop_outliers(again, p.threshold);
      store_pack(p.codes, start + pack, encode_pack(again, inverse));
    }
  }

  if constexpr (kColumns) {
    UNROLL for (int i = 0; i < kPacks; ++i) {
      const unsigned pack = threadIdx.x + i * blockDim.x;
      if (pack >= resident) break;
      UNROLL for (int e = 0; e < kWidth; ++e) atomicMax(column_absmax + pack * kWidth + e, column_max[i * kWidth + e]);
    }
  }
}

template <class T, int kWidth, bool kColumns, bool kSkip>
void launch_rows(const QuantizeRows& p, uint32_t* column_absmax, Stream stream) {
  if (p.cols == 0) return fill_bytes(p.scale, 0, p.rows * sizeof(float), stream);
  constexpr int64_t kMost = kRowThreads<kColumns>;
  const int64_t wanted = ceil_div(ceil_div(p.cols, kRowElements<kWidth>), 32) * 32;
  const unsigned threads = static_cast<unsigned>(wanted < 32 ? 32 : wanted > kMost ? kMost : wanted);
  const dim3 block(threads, threads == 32 ? kWarpRows : 1);
  int64_t grid = ceil_div(p.rows, block.y);
  // With columns, a few rows per block: their atomics are then a fraction of the traffic of x.
  const int64_t most = kColumns ? (ceil_div(grid, 4) < 1024 ? ceil_div(grid, 4) : 1024) : kRowBlocks;
  if (grid > most) grid = most;
  auto kernel = quantize_rows_kernel<T, kWidth, kColumns, kSkip>;
  LAUNCH(kernel, dim3(static_cast<unsigned>(grid)), block, 0, stream, p, column_absmax);
}

// ---- columns ----
//
// Two reads, since a code needs the whole column: maxima into a workspace, then codes. x is read by tiles.

// What there is per column (maxima, scales) moves up to 16 bytes at a time, too.
template <int kWidth>
constexpr int kPart = kWidth < 4 ? kWidth : 4;

template <class T, int kWidth>
__global__ void __launch_bounds__(kTileLanes* kTileWarps) column_absmax_kernel(QuantizeColumns p) {
  constexpr int kParts = kWidth / kPart<kWidth>, kCols = kTileLanes * kWidth;
  SHARED(uint32_t, partial, [kTileWarps][kCols]);
  const Tile<kWidth> tile(p.rows, p.cols);
  Pack<uint32_t, kPart<kWidth>> absmax[kParts] = {};
  if (tile.pack < tile.packs) {
    for (int64_t row = tile.row; row < tile.end; row += kTileWarps) {
      const auto x = load_pack<kWidth>(static_cast<const T*>(p.x), row * tile.packs + tile.pack);
      UNROLL for (int e = 0; e < kWidth; ++e) {
        uint32_t& most = absmax[e / kPart<kWidth>].at[e % kPart<kWidth>];
        const uint32_t bits = abs_bits(to_float(x.at[e]));
        most = bits > most ? bits : most;
      }
    }
  }
  UNROLL for (int q = 0; q < kParts; ++q) store_pack(partial[threadIdx.y], threadIdx.x * kParts + q, absmax[q]);
  __syncthreads();
  // A thread per column: lanes side by side in shared memory and in their atomics.
  const int64_t first = (tile.pack - threadIdx.x) * kWidth;
  const int column = threadIdx.y * kTileLanes + threadIdx.x;
  static_assert(kCols <= kTileLanes * kTileWarps);
  if (column >= kCols || first + column >= p.cols) return;
  uint32_t most = 0;
  UNROLL for (int warp = 0; warp < kTileWarps; ++warp) {
    const uint32_t bits = partial[warp][column];
    most = bits > most ? bits : most;
  }
  atomicMax(p.absmax + first + column, most);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kTileLanes* kTileWarps) encode_columns_kernel(QuantizeColumns p) {
  constexpr int kParts = kWidth / kPart<kWidth>;
  const Tile<kWidth> tile(p.rows, p.cols);
  if (tile.pack >= tile.packs) return;
  float inverse[kWidth];
  UNROLL for (int q = 0; q < kParts; ++q) {
    const auto absmax = load_pack<kPart<kWidth>>(p.absmax, tile.pack * kParts + q);
    Pack<float, kPart<kWidth>> scale;
    UNROLL for (int e = 0; e < kPart<kWidth>; ++e) {
      inverse[q * kPart<kWidth> + e] = inverse_scale_of(absmax.at[e]);
      scale.at[e] = scale_of(absmax.at[e]);
    }
    if (tile.first && threadIdx.y == 0) store_pack(p.scale, tile.pack * kParts + q, scale);
  }
  NO_UNROLL for (int64_t row = tile.row; row < tile.end; row += kTileWarps) {
    const auto x = load_pack<kWidth>(static_cast<const T*>(p.x), row * tile.packs + tile.pack);
    Pack<int8_t, kWidth> codes;
    UNROLL for (int e = 0; e < kWidth; ++e) codes.at[e] = encode(to_float(x.at[e]), inverse[e]);
    store_pack(p.codes, row * tile.packs + tile.pack, codes);
  }
}

template <class T, int kWidth>
void launch_columns(const QuantizeColumns& p, Stream stream) {
  const auto grid = Tile<kWidth>::grid(p.rows, p.cols), block = Tile<kWidth>::block();
  bool absmax_done = p.rows == 0;
  if (p.row_scale != nullptr && p.rows > 0) {
    const QuantizeRows rows{.x = p.x,
                            .dtype = p.dtype,
                            .codes = p.row_codes,
                            .scale = p.row_scale,
                            .skip = nullptr,
                            .threshold = 0.0f,
                            .rows = p.rows,
                            .cols = p.cols};
    // Longer rows do not stay in registers, nor would their columns' maxima: there the columns cost a read of their
    // own.
    absmax_done = p.cols <= kRowElements<kWidth> * kRowThreads<true>;
    if (absmax_done)
      launch_rows<T, kWidth, true, false>(rows, p.absmax, stream);
    else
      launch_rows<T, kWidth, false, false>(rows, nullptr, stream);
  }
  if (p.cols == 0) return;
  if (!absmax_done) {
    auto kernel = column_absmax_kernel<T, kWidth>;
    LAUNCH(kernel, grid, block, 0, stream, p);
  }
  if (p.scale == nullptr) return;
  auto kernel = encode_columns_kernel<T, kWidth>;
  LAUNCH(kernel, grid, block, 0, stream, p);
}

// ---- tensor ----
//
// Flat: packs by a grid-stride loop, and the elements left over at the end one by one.

constexpr int kFlatThreads = 256;
constexpr int64_t kFlatBlocks = 2048;  // at most: fills any GPU, and one atomic per block is nothing

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) tensor_absmax_kernel(QuantizeTensor p) {
  SHARED(uint32_t, scratch, [kMaxWarps]);
  const T* x = static_cast<const T*>(p.x);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kFlatThreads, packs = p.count / kWidth;
  uint32_t absmax = 0;
  for (int64_t i = thread; i < packs; i += threads) {
    const uint32_t bits = absmax_bits(load_pack<kWidth>(x, i));
    absmax = bits > absmax ? bits : absmax;
  }
  NO_UNROLL for (int64_t i = packs * kWidth + thread; i < p.count; i += threads) {
    const uint32_t bits = abs_bits(to_float(x[i]));
    absmax = bits > absmax ? bits : absmax;
  }
  absmax = block_max(absmax, scratch);
  if (threadIdx.x == 0) atomicMax(p.absmax, absmax);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads) encode_tensor_kernel(QuantizeTensor p) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kFlatThreads, packs = p.count / kWidth;
  const uint32_t absmax = *p.absmax;
  const float inverse = inverse_scale_of(absmax);
  if (thread == 0) *p.scale = scale_of(absmax);
  for (int64_t i = thread; i < packs; i += threads)
    store_pack(p.codes, i, encode_pack(load_pack<kWidth>(x, i), inverse));
  NO_UNROLL for (int64_t i = packs * kWidth + thread; i < p.count; i += threads) p.codes[i] =
      encode(to_float(x[i]), inverse);
}

template <class T, int kWidth>
void launch_tensor(const QuantizeTensor& p, Stream stream) {
  const int64_t wanted = ceil_div(p.count, int64_t{kFlatThreads} * 16);  // 16 elements per thread, as for rows
  const dim3 grid(static_cast<unsigned>(wanted < 1 ? 1 : wanted > kFlatBlocks ? kFlatBlocks : wanted));
  if (p.count > 0) {
    auto kernel = tensor_absmax_kernel<T, kWidth>;
    LAUNCH(kernel, grid, dim3(kFlatThreads), 0, stream, p);
  }
  if (p.scale == nullptr) return;
  auto kernel = encode_tensor_kernel<T, kWidth>;
  LAUNCH(kernel, grid, dim3(kFlatThreads), 0, stream, p);
}

// ---- back ----

template <class T, int kWidth>
__global__ void __launch_bounds__(kTileLanes* kTileWarps) dequantize_rows_kernel(DequantizeRows p) {
  const Tile<kWidth> tile(p.rows, p.cols);
  if (tile.pack >= tile.packs) return;
  for (int64_t row = tile.row; row < tile.end; row += kTileWarps) {
    const auto codes = load_pack<kWidth>(p.codes, row * tile.packs + tile.pack);
    const float scale = p.scale[row];
    Pack<T, kWidth> out;
    UNROLL for (int e = 0; e < kWidth; ++e) out.at[e] = from_float<T>(static_cast<float>(codes.at[e]) * scale);
    store_pack(static_cast<T*>(p.out), row * tile.packs + tile.pack, out);
  }
}

template <class T, int kWidth>
void launch_dequantize(const DequantizeRows& p, Stream stream) {
  auto kernel = dequantize_rows_kernel<T, kWidth>;
  LAUNCH(kernel, Tile<kWidth>::grid(p.rows, p.cols), Tile<kWidth>::block(), 0, stream, p);
}

template <class T, int kWidth>
void launch_rows(const QuantizeRows& p, Stream stream) {
  if (p.skip != nullptr)
    launch_rows<T, kWidth, false, true>(p, nullptr, stream);
  else
    launch_rows<T, kWidth, false, false>(p, nullptr, stream);
}

void quantize_rows(const QuantizeRows& p, Stream stream) {
  if (p.rows == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorWidth<T>;
    if (packable(static_cast<const T*>(p.x), p.cols, kVector) && packable(p.codes, p.cols, kVector) &&
        packable(p.skip, p.cols, kVector))
      launch_rows<T, kVector>(p, stream);
    else
      launch_rows<T, 1>(p, stream);
  });
}

void quantize_columns(const QuantizeColumns& p, Stream stream) {
  if (p.cols > 0) fill_bytes(p.absmax, 0, p.cols * sizeof(uint32_t), stream);
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorWidth<T>;
    if (packable(static_cast<const T*>(p.x), p.cols, kVector) && packable(p.codes, p.cols, kVector) &&
        packable(p.row_codes, p.cols, kVector) && packable(p.absmax, p.cols, 4) && packable(p.scale, p.cols, 4))
      launch_columns<T, kVector>(p, stream);
    else
      launch_columns<T, 1>(p, stream);
  });
}

void quantize_tensor(const QuantizeTensor& p, Stream stream) {
  fill_bytes(p.absmax, 0, sizeof(uint32_t), stream);
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorWidth<T>;
    if (packable(static_cast<const T*>(p.x), 0, kVector) && packable(p.codes, 0, kVector))
      launch_tensor<T, kVector>(p, stream);
    else
      launch_tensor<T, 1>(p, stream);
  });
}

void dequantize_rows(const DequantizeRows& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorWidth<T>;
    if (packable(static_cast<const T*>(p.out), p.cols, kVector) && packable(p.codes, p.cols, kVector))
      launch_dequantize<T, kVector>(p, stream);
    else
      launch_dequantize<T, 1>(p, stream);
  });
}

}  // namespace octavo::GPU_NS
