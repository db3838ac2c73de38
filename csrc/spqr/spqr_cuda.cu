// SpQR on a GPU: what the products share (the order of x's columns, the workspace, the choice of kernel), and the
// weight as a matrix. The products themselves are in spqr_stream_cuda.cu and spqr_tiles_cuda.cu.
#include <algorithm>
#include <type_traits>

#include "common/reduce.h"
#include "common/tile.h"
#include "spqr/decode_gpu.h"
#include "spqr/work_gpu.h"

namespace octavo::GPU_NS {

// ---- x in the order of the quantizer ----
//
// Gathered once, instead of by each of the n / 16 blocks that need all of it.

SpqrStaged spqr_staged(const SpqrMatmul& p) {
  const auto padded = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  SpqrStaged s{};
  s.tiles = p.m > kSpqrStreamRows && p.dtype != DType::f32;
  s.rows = s.tiles || p.m == 1 ? 1 : p.m <= 4 || p.dtype == DType::f32 ? 4 : 8;
  s.planes = p.dtype == DType::f32 ? 3 : 1;
  s.passes = ceil_div(p.m, s.rows);
  if (s.tiles) {
    s.chunks = ceil_div(spqr_chunks(p.w), 2) * 2;
    s.bytes = s.passes * s.chunks * 64;
    return s;
  }
  s.chunks = ceil_div(spqr_chunks(p.w), kStreamChunks) * kStreamChunks;
  s.blocks_per_second = static_cast<unsigned>(std::min<int64_t>(p.w.stats_group_size / 16 * s.passes, UINT32_MAX));
  s.x = padded(spqr_chunk_of_x(s.planes, s.rows));
  s.columns = padded(s.x + s.passes * s.chunks * spqr_chunk_of_x(s.planes, s.rows));
  s.bytes = s.columns + (p.w.row_offsets == nullptr ? 0 : padded(s.passes * p.w.k * s.rows * element));
  return s;
}

constexpr int kPermuteWarps = 8;

// A warp takes a chunk of a pass: which columns these are it reads once for all rows.
template <class T>
__global__ void __launch_bounds__(kPermuteWarps * 32) spqr_permute_kernel(SpqrMatmul p, SpqrStaged at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* work = static_cast<unsigned char*>(p.workspace);
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < at.x / 4; i += kPermuteWarps * 32) reinterpret_cast<uint32_t*>(work)[i] = 0;
  }
  const unsigned across = static_cast<unsigned>(ceil_div(at.chunks, kPermuteWarps));
  const int64_t chunk = static_cast<int64_t>(blockIdx.x % across) * kPermuteWarps + warp, pass = blockIdx.x / across;
  if (chunk >= at.chunks) return;
  const int64_t column = chunk * kChunk + lane;
  const bool inside = column < p.w.k;
  const T* from = static_cast<const T*>(p.x) + (inside ? spqr_source_column(p.w, column) : 0);
  unsigned char* of_chunk = work + at.x + (pass * at.chunks + chunk) * spqr_chunk_of_x(at.planes, at.rows);
  auto* to = reinterpret_cast<uint16_t*>(of_chunk) + lane;
  float* sums = reinterpret_cast<float*>(of_chunk + at.planes * at.rows * 64) + lane / 16 * at.rows;
  const bool by_column = p.w.row_offsets != nullptr && inside;
  T* columns = reinterpret_cast<T*>(work + at.columns) + (pass * p.w.k + column) * at.rows;
  for (int row = 0; row < at.rows; ++row) {
    const int64_t j = pass * at.rows + row;
    T value{};
    if (inside && j < p.m) value = from[j * p.w.k];
    if constexpr (std::is_same_v<T, float>) {
      float rest = value;  // the upper bits, then those of what is left: their sum is the value
      UNROLL for (int plane = 0; plane < 3; ++plane) {
        const uint32_t bits = float_bits(rest) & 0xffff0000u;
        to[(plane * at.rows + row) * kChunk] = static_cast<uint16_t>(bits >> 16);
        rest -= bits_float(bits);
      }
    } else {
      to[row * kChunk] = value.bits;
    }
    float sum = to_float(value);
    UNROLL for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    if (lane % 16 == 0) sums[row] = sum;
    if (by_column) columns[row] = value;
  }
}

// The same for many rows, which a block takes one by one: it reads them in their order, and the gather is from shared
// memory where a row fits.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kPermuteWarps * 32) spqr_permute_rows_kernel(SpqrMatmul p, SpqrStaged at) {
  DYNAMIC_SHARED(T, row);
  const int64_t j = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + j * p.w.k;
  if constexpr (kStaged) {
    for (int64_t i = threadIdx.x; i < p.w.k; i += kPermuteWarps * 32) row[i] = x[i];
    __syncthreads();
  }
  auto* to = static_cast<uint32_t*>(p.workspace) + j * at.chunks * (kChunk / 2);
  for (int64_t pair = threadIdx.x; pair < at.chunks * (kChunk / 2); pair += kPermuteWarps * 32) {
    uint32_t word = 0;
    if (pair * 2 < p.w.k) {
      UNROLL for (int e = 0; e < 2; ++e) {
        const int64_t source = spqr_source_column(p.w, pair * 2 + e);
        word |= static_cast<uint32_t>(kStaged ? row[source].bits : x[source].bits) << 16 * e;
      }
    }
    to[pair] = word;
  }
}

constexpr int64_t kFreeShared = 48 << 10;  // what every architecture gives a block without asking

template <class T>
void launch_permute(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  const dim3 block(kPermuteWarps * 32);
  if constexpr (!std::is_same_v<T, float>) {
    if (staged.tiles) {
      const bool fits = p.w.k * static_cast<int64_t>(sizeof(T)) <= kFreeShared;
      auto kernel = fits ? spqr_permute_rows_kernel<T, true> : spqr_permute_rows_kernel<T, false>;
      LAUNCH(kernel, dim3(static_cast<unsigned>(p.m)), block, fits ? p.w.k * sizeof(T) : 0, stream, p, staged);
      return;
    }
  }
  auto kernel = spqr_permute_kernel<T>;
  const auto blocks = static_cast<unsigned>(ceil_div(staged.chunks, kPermuteWarps) * staged.passes);
  LAUNCH(kernel, dim3(blocks), block, 0, stream, p, staged);
}

int64_t spqr_workspace(const SpqrMatmul& p) {
  return spqr_staged(p).bytes;
}

void spqr_matmul(const SpqrMatmul& p, Stream stream) {
  if (p.m == 0 || p.w.n == 0) return;
  const SpqrStaged staged = spqr_staged(p);
  if (staged.chunks > 0)
    dispatch_float(p.dtype, [&](auto element) { launch_permute<decltype(element)>(p, staged, stream); });
  staged.tiles ? spqr_tiles(p, staged, stream) : spqr_stream(p, staged, stream);
}

// ---- the weight as a matrix ----
//
// A block takes four rows, whose words are one 16-byte access, or one row where four do not fit into shared memory. The
// permutation scatters there; what leaves is whole rows. Only rows that do not fit at all are scattered in memory.

constexpr int kDequantizeThreads = 128;

template <class T, int kBits, int kRows, bool kStaged>
__global__ void __launch_bounds__(kDequantizeThreads, 4) spqr_dequantize_kernel(SpqrDequantize p) {
  DYNAMIC_SHARED(T, staged);
  const SpqrWeight& w = p.w;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, tile = row0 / kTileRows16;
  const int r0 = static_cast<int>(row0 % kTileRows16);
  const int rows = w.n - row0 < kRows ? static_cast<int>(w.n - row0) : kRows;
  const int group_shift = w.group_size == 64 ? 6 : w.group_size == 32 ? 5 : 4;
  const int64_t groups = w.k >> group_shift, second_row = second_order_row(w, tile);
  const FieldShape fields(w);
  const auto statistics_of = [&](int r, int64_t column) {
    RawStatistics raw;
    raw.load(w, tile, r0 + r, column >> group_shift, groups, second_row);
    return raw.decode(w, fields);
  };
  const float unit = *w.unit;
  T* out = static_cast<T*>(p.out) + row0 * w.k;
  T* to = kStaged ? staged : out;
  using Offset = std::conditional_t<kStaged, int, int64_t>;
  const auto stride = static_cast<Offset>(w.k);
  for (int64_t chunk = threadIdx.x; chunk < spqr_chunks(w); chunk += kDequantizeThreads) {
    uint32_t planes[kRows][kBits];  // rows of the tile beyond n are there, too, and have room in shared memory
    const uint32_t* words = spqr_codes(w, tile, chunk);
    UNROLL for (int i = 0; i < kBits; ++i) {
      const auto pack = load_pack<kRows>(words + i * kTileRows16 + r0, 0);
      UNROLL for (int r = 0; r < kRows; ++r) planes[r][i] = pack.at[r];
    }
    UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t column0 = chunk * kChunk + half * 16;
      if (column0 >= w.k) break;
      SpqrStatistics statistics[kRows];
      UNROLL for (int r = 0; r < kRows; ++r) {
        statistics[r] = statistics_of(r, column0);
      }
      UNROLL for (int e = 0; e < 8; ++e) {
        const auto even = static_cast<Offset>(spqr_source_column(w, column0 + 2 * e));
        const auto odd = static_cast<Offset>(spqr_source_column(w, column0 + 2 * e + 1));
        UNROLL for (int r = 0; r < kRows; ++r) {
          const uint32_t pair = code_pair<Half, kBits>(planes[r], half * 8 + e);
          const auto weight = [&](uint32_t code) {
            const float difference = to_float(Half{static_cast<uint16_t>(code)}) - statistics[r].zero;
            return from_float<T>(unit * (statistics[r].scale * difference));
          };
          to[r * stride + even] = weight(pair);
          to[r * stride + odd] = weight(pair >> 16);
        }
      }
    }
  }
  __syncthreads();
  if (w.row_offsets != nullptr) {  // a weight that has an outlier is made again: it is rounded once
    const int64_t end = w.row_offsets[row0 + rows];
    int64_t i = w.row_offsets[row0] + threadIdx.x;
    for (; i < end; i += kDequantizeThreads) {
      int r = 0;
      UNROLL for (int next = 1; next < kRows; ++next) r += next < rows && i >= w.row_offsets[row0 + next];
      const SpqrOutlier outlier = spqr_outlier(w, i);
      const int64_t chunk = outlier.column / kChunk;
      const int of_chunk = static_cast<int>(outlier.column % kChunk);
      const uint32_t pair = spqr_pair(kBits, spqr_codes(w, tile, chunk) + r0 + r, kTileRows16, of_chunk / 2);
      const SpqrStatistics s = statistics_of(r, outlier.column);
      const float dense = s.scale * (static_cast<float>(pair >> of_chunk % 2 * 16 & 0xffffu) - s.zero);
      to[r * stride + static_cast<Offset>(spqr_source_column(w, outlier.column))] =
          from_float<T>(unit * (dense + outlier.value));
    }
  }
  if constexpr (kStaged) {
    __syncthreads();
    constexpr int kWidth = kVectorWidth<T>;
    const int64_t count = rows * w.k;
    const int64_t packs = reinterpret_cast<uintptr_t>(out) % 16 == 0 ? count / kWidth : 0;
    for (int64_t i = threadIdx.x; i < packs; i += kDequantizeThreads) store_pack(out, i, load_pack<kWidth>(staged, i));
    for (int64_t i = packs * kWidth + threadIdx.x; i < count; i += kDequantizeThreads) out[i] = staged[i];
  }
}

template <class T, int kBits>
void launch_dequantize(const SpqrDequantize& p, Stream stream) {
  const int64_t row_bytes = p.w.k * static_cast<int64_t>(sizeof(T));
  const bool four = 4 * row_bytes <= kFreeShared && reinterpret_cast<uintptr_t>(p.w.codes) % 16 == 0;
  const bool staged = row_bytes <= kFreeShared;
  auto kernel = four     ? spqr_dequantize_kernel<T, kBits, 4, true>
                : staged ? spqr_dequantize_kernel<T, kBits, 1, true>
                         : spqr_dequantize_kernel<T, kBits, 1, false>;
  const auto blocks = static_cast<unsigned>(ceil_div(p.w.n, four ? 4 : 1));
  LAUNCH(kernel, dim3(blocks), dim3(kDequantizeThreads), four ? 4 * row_bytes : staged ? row_bytes : 0, stream, p);
}

void spqr_dequantize(const SpqrDequantize& p, Stream stream) {
  if (p.w.n == 0 || p.w.k == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.w.bits) {
      case 2: return launch_dequantize<T, 2>(p, stream);
      case 3: return launch_dequantize<T, 3>(p, stream);
      default: return launch_dequantize<T, 4>(p, stream);
    }
  });
}

}  // namespace octavo::GPU_NS
