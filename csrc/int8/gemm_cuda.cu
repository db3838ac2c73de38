// The int8 product: exact int32 sums by dp4a, then dequantization, bias, outlier columns and the output's dtype in
// registers, so that no int32 matrix ever exists in memory. Two kernels: tiles in shared memory for many rows of a, and
// one that streams the weights for few.
#include <type_traits>

#include "common/launch.h"
#include "common/numeric.h"
#include "common/reduce.h"
#include "common/tile.h"
#include "int8/gemm.h"

namespace octavo::GPU_NS {

// Four int8 products at a time of 16 bytes each of a and b.
__device__ inline int32_t dot16(const int4& a, const int4& b, int32_t sum) {
  sum = __dp4a(a.x, b.x, sum);
  sum = __dp4a(a.y, b.y, sum);
  sum = __dp4a(a.z, b.z, sum);
  return __dp4a(a.w, b.w, sum);
}

// What an outlier column is multiplied by for output column j: the kept 16-bit weight, or else the code. Returns
// whether it was kept, which decides the sum that it enters.
__device__ inline bool outlier_weight(const Int8Gemm& p, int32_t column, int64_t j, float& weight) {
  const int32_t slot = p.outlier_slot == nullptr ? -1 : p.outlier_slot[column];
  const bool kept = slot >= 0 && slot < p.outlier_slots;
  weight = kept ? load_float(p.outlier_weight, p.outlier_weight_dtype, slot * p.n + j)
                : static_cast<float>(p.b[j * p.k + column]);
  return kept;
}

// What the epilogue needs per output column.
struct ColumnTerms {
  float scale, bias;
};

__device__ inline ColumnTerms column_terms(const Int8Gemm& p, int64_t j) {
  return {p.b_scale[j * p.b_scale_stride], p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, j)};
}

// ---- tiles ----
//
// A block computes 64 x 64 outputs with 256 threads, 4 x 4 each, strided: a warp covers 2 x 16, so that for 16 bytes of
// k its reads of shared memory take 12 cycles and its dp4a 32, and dp4a stays the limit. 64 x 64 rather than more so
// that a few hundred rows still make enough blocks. The next step of k is on its way from memory to registers while
// the present one is computed.
//
// Shared memory holds 64 bytes of k per row in 16-byte chunks. Chunk c of row r lies at c ^ (r / 2 % 4): 8 threads that
// read the same chunk of 8 rows, and 8 that write the chunks of 2 rows, then touch all 32 banks once.

constexpr int kTileM = 64, kTileN = 64, kTileK = 64, kChunks = kTileK / 16;
constexpr int kThreads = 256, kThreadsM = 16, kThreadsN = 16;
constexpr int kThreadM = kTileM / kThreadsM, kThreadN = kTileN / kThreadsN;  // outputs per thread
constexpr int kOutlierStep = 16;                                             // outlier columns staged at a time
static_assert(kTileM == kTileN && kTileM * kChunks == kThreads, "a thread stages one chunk of a and one of b");

__device__ inline int swizzled(int row, int chunk) {
  return chunk ^ (row / 2 % kChunks);
}

// 16 bytes of a row from byte k0 on, zeros past its end or where there is no row. Without kVector k is not a multiple
// of 16, or the rows are not aligned: byte by byte.
template <bool kVector>
__device__ inline int4 load_chunk(const int8_t* row, int k0, int k) {
  int4 chunk = make_int4(0, 0, 0, 0);
  if (row == nullptr || k0 >= k) return chunk;
  if constexpr (kVector) {
    chunk = *reinterpret_cast<const int4*>(row + k0);
  } else {
    uint32_t words[4] = {};
    UNROLL for (int byte = 0; byte < 16; ++byte) {
      if (k0 + byte < k) words[byte / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(row[k0 + byte])) << byte % 4 * 8;
    }
    chunk = make_int4(words[0], words[1], words[2], words[3]);
  }
  return chunk;
}

template <class Out, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) int8_gemm_kernel(Int8Gemm p) {
  constexpr bool kExact = std::is_same_v<Out, int32_t>;
  SHARED(int4, a_tile, [kTileM][kChunks]);
  SHARED(int4, b_tile, [kTileN][kChunks]);
  // Blocks that follow each other take the same columns of the output: each part of the weight, the larger operand, is
  // read from memory once and then found in L2.
  const unsigned down = static_cast<unsigned>(ceil_div(p.m, kTileM));
  const int64_t m0 = static_cast<int64_t>(blockIdx.x % down) * kTileM;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / down) * kTileN;
  const int thread = threadIdx.x, tm = thread / kThreadsN, tn = thread % kThreadsN;

  const int k = static_cast<int>(p.k);  // at most kMaxK
  const int staged_row = thread / kChunks, staged_chunk = thread % kChunks;
  const int8_t* a_row = m0 + staged_row < p.m ? p.a + (m0 + staged_row) * p.k : nullptr;
  const int8_t* b_row = n0 + staged_row < p.n ? p.b + (n0 + staged_row) * p.k : nullptr;
  int4 a_next, b_next;
  const auto fetch = [&](int k0) {
    a_next = load_chunk<kVector>(a_row, k0 + staged_chunk * 16, k);
    b_next = load_chunk<kVector>(b_row, k0 + staged_chunk * 16, k);
  };

  int32_t acc[kThreadM][kThreadN] = {};
  fetch(0);
  for (int k0 = 0; k0 < k; k0 += kTileK) {
    __syncthreads();  // the previous step has been read
    a_tile[staged_row][swizzled(staged_row, staged_chunk)] = a_next;
    b_tile[staged_row][swizzled(staged_row, staged_chunk)] = b_next;
    __syncthreads();
    fetch(k0 + kTileK);
    NO_UNROLL for (int chunk = 0; chunk < kChunks; ++chunk) {
      int4 b[kThreadN];
      UNROLL for (int j = 0; j < kThreadN; ++j) {
        const int row = tn + j * kThreadsN;
        b[j] = b_tile[row][swizzled(row, chunk)];
      }
      UNROLL for (int i = 0; i < kThreadM; ++i) {
        const int row = tm + i * kThreadsM;
        const int4 a = a_tile[row][swizzled(row, chunk)];
        UNROLL for (int j = 0; j < kThreadN; ++j) acc[i][j] = dot16(a, b[j], acc[i][j]);
      }
    }
  }

  float sum8[kThreadM][kThreadN] = {}, sum16[kThreadM][kThreadN] = {};
  if (!kExact && p.x != nullptr) {
    SHARED(float, x_tile, [kOutlierStep][kTileM]);
    SHARED(float, w_tile, [kOutlierStep][kTileN]);
    SHARED(int, is_kept, [kOutlierStep]);
    const int32_t count = *p.count;
    for (int32_t c0 = 0; c0 < count; c0 += kOutlierStep) {
      const int step = count - c0 < kOutlierStep ? count - c0 : kOutlierStep;
      __syncthreads();  // the previous step has been read
      for (int item = thread; item < step * kTileM; item += kThreads) {
        const int c = item / kTileM, row = item % kTileM;
        const int32_t column = p.columns[c0 + c];
        x_tile[c][row] = m0 + row < p.m ? load_float(p.x, p.x_dtype, (m0 + row) * p.k + column) : 0.0f;
        float weight = 0.0f;
        // Whether a column was kept is the same for every row: the row that is always there says it.
        const bool kept = n0 + row < p.n && outlier_weight(p, column, n0 + row, weight);
        w_tile[c][row] = weight;
        if (row == 0) is_kept[c] = kept;
      }
      __syncthreads();
      NO_UNROLL for (int c = 0; c < step; ++c) {
        float x[kThreadM], w[kThreadN];
        UNROLL for (int i = 0; i < kThreadM; ++i) x[i] = x_tile[c][tm + i * kThreadsM];
        UNROLL for (int j = 0; j < kThreadN; ++j) w[j] = w_tile[c][tn + j * kThreadsN];
        if (is_kept[c]) {
          UNROLL for (int i = 0; i < kThreadM; ++i) UNROLL for (int j = 0; j < kThreadN; ++j) sum16[i][j] =
              fmaf(x[i], w[j], sum16[i][j]);
        } else {
          UNROLL for (int i = 0; i < kThreadM; ++i) UNROLL for (int j = 0; j < kThreadN; ++j) sum8[i][j] =
              fmaf(x[i], w[j], sum8[i][j]);
        }
      }
    }
  }

  Out* out = static_cast<Out*>(p.out);
  [[maybe_unused]] float a_scale[kThreadM] = {};
  if constexpr (!kExact) {
    UNROLL for (int i = 0; i < kThreadM; ++i) {
      const int64_t row = m0 + tm + i * kThreadsM;
      if (row < p.m) a_scale[i] = p.a_scale[row * p.a_scale_stride];
    }
  }
  UNROLL for (int j = 0; j < kThreadN; ++j) {
    const int64_t column = n0 + tn + j * kThreadsN;
    if (column >= p.n) break;
    [[maybe_unused]] ColumnTerms terms{};
    if constexpr (!kExact) terms = column_terms(p, column);
    UNROLL for (int i = 0; i < kThreadM; ++i) {
      const int64_t row = m0 + tm + i * kThreadsM;
      if (row >= p.m) break;
      if constexpr (kExact)
        out[row * p.n + column] = acc[i][j];
      else
        out[row * p.n + column] =
            from_float<Out>(dequantize(acc[i][j], a_scale[i], terms.scale, sum8[i][j], sum16[i][j], terms.bias));
    }
  }
}

// ---- few rows ----
//
// Bound by reading the weight once. A warp per output column streams its row of b, 16 bytes per lane, against up to 4
// rows of a, which stay in L1; one reduction per row at the end. Outlier columns are gathered 32 at a time, a column
// per lane, and then added in order from the lanes' registers: the same chains of fmaf as everywhere.

constexpr int kFewRows = 4, kFewWarps = 8;

template <class Out>
__global__ void __launch_bounds__(kFewWarps * 32) int8_gemm_few_rows_kernel(Int8Gemm p) {
  constexpr bool kExact = std::is_same_v<Out, int32_t>;
  const int lane = threadIdx.x % 32, m = static_cast<int>(p.m);
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kFewWarps + threadIdx.x / 32;
  if (j >= p.n) return;  // a whole warp

  const int64_t chunks = p.k / 16;
  const int4* a = reinterpret_cast<const int4*>(p.a);
  const int4* b = reinterpret_cast<const int4*>(p.b) + j * chunks;
  int32_t acc[kFewRows] = {};
  for (int64_t chunk = lane; chunk < chunks; chunk += 32) {
    const int4 weight = b[chunk];
    UNROLL for (int i = 0; i < kFewRows; ++i) {
      if (i < m) acc[i] = dot16(a[i * chunks + chunk], weight, acc[i]);
    }
  }
  UNROLL for (int i = 0; i < kFewRows; ++i) acc[i] = warp_sum(acc[i]);

  float sum8[kFewRows] = {}, sum16[kFewRows] = {};
  if (!kExact && p.x != nullptr) {
    const int32_t count = *p.count;
    for (int32_t c0 = 0; c0 < count; c0 += 32) {
      const int step = count - c0 < 32 ? count - c0 : 32;
      float x[kFewRows] = {}, weight = 0.0f;
      bool kept = false;
      if (lane < step) {
        const int32_t column = p.columns[c0 + lane];
        kept = outlier_weight(p, column, j, weight);
        UNROLL for (int i = 0; i < kFewRows; ++i) {
          if (i < m) x[i] = load_float(p.x, p.x_dtype, i * p.k + column);
        }
      }
      const uint32_t kept_lanes = __ballot_sync(kFullWarp, kept);
      NO_UNROLL for (int from = 0; from < step; ++from) {
        const float w = __shfl_sync(kFullWarp, weight, from);
        UNROLL for (int i = 0; i < kFewRows; ++i) {
          const float value = __shfl_sync(kFullWarp, x[i], from);
          if (kept_lanes >> from & 1)
            sum16[i] = fmaf(value, w, sum16[i]);
          else
            sum8[i] = fmaf(value, w, sum8[i]);
        }
      }
    }
  }

  Out* out = static_cast<Out*>(p.out);
  UNROLL for (int i = 0; i < kFewRows; ++i) {
    if (lane != i || i >= m) continue;
    if constexpr (kExact) {
      out[i * p.n + j] = acc[i];
    } else {
      const ColumnTerms terms = column_terms(p, j);
      out[i * p.n + j] = from_float<Out>(
          dequantize(acc[i], p.a_scale[i * p.a_scale_stride], terms.scale, sum8[i], sum16[i], terms.bias));
    }
  }
}

template <class Out>
void launch_gemm(const Int8Gemm& p, Stream stream) {
  const bool vector = packable(p.a, p.k, 16) && packable(p.b, p.k, 16);
  if (vector && p.m <= kFewRows) {
    auto kernel = int8_gemm_few_rows_kernel<Out>;
    LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(p.n, kFewWarps))), dim3(kFewWarps * 32), 0, stream, p);
  } else {
    auto kernel = vector ? int8_gemm_kernel<Out, true> : int8_gemm_kernel<Out, false>;
    const auto tiles = static_cast<unsigned>(ceil_div(p.m, kTileM) * ceil_div(p.n, kTileN));
    LAUNCH(kernel, dim3(tiles), dim3(kThreads), 0, stream, p);
  }
}

void int8_gemm(const Int8Gemm& p, Stream stream) {
  if (p.m == 0 || p.n == 0) return;
  if (p.out_dtype == DType::i32) return launch_gemm<int32_t>(p, stream);
  dispatch_float(p.out_dtype, [&](auto element) { launch_gemm<decltype(element)>(p, stream); });
}

}  // namespace octavo::GPU_NS
