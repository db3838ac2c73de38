// The int8 product on tensor cores: exact int32 sums, then scales, bias, outlier columns and the output's dtype in the
// accumulators' registers, so that no int32 matrix ever exists in memory. Two kernels: tiles that pass through shared
// memory for many rows of a, and one that streams the weights for few.
#include <type_traits>

#include "common/launch.h"
#include "common/numeric.h"
#include "common/ptx.h"
#include "common/reduce.h"
#include "common/tile.h"
#include "int8/gemm.h"

namespace octavo::GPU_NS {

// ---- outlier columns: for each, an element of x per row and a weight per column of the output ----

constexpr int kOutlierStep = 16;  // outlier columns staged at a time: the k of one mma_16bit

// Entry c of the list. One pass takes the columns whose weights were kept, another the rest; what does not belong to
// the pass, or is past the end, is zero in x and in the weights: Inf * 0 never arises.
struct OutlierColumn {
  int32_t column;
  int64_t slot;  // of the kept weights
  bool use;

  __device__ OutlierColumn(const Int8Gemm& p, int32_t c, int32_t count, bool kept) : column(0), slot(-1), use(false) {
    if (c >= count) return;
    column = p.columns[c];
    if (p.outlier_slot != nullptr) slot = p.outlier_slot[column];
    use = (slot >= 0 && slot < p.outlier_slots) == kept;
  }
};

__device__ inline float column_bias(const Int8Gemm& p, int64_t j) {
  return p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, j);
}

// 16 bytes, of which only the first `count` are there; the rest becomes zero. For k that is not a multiple of 16, or
// rows that are not aligned: byte by byte.
__device__ inline int4 load_bytes(const int8_t* from, int count) {
  uint32_t words[4] = {};
  UNROLL for (int byte = 0; byte < 16; ++byte) {
    if (byte < count) words[byte / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[byte])) << byte % 4 * 8;
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

// ---- tiles ----
//
// A block computes kM x kN outputs. Steps of kStepK bytes of k travel from memory to shared memory by cp.async, kStages
// of them in a ring, so that the next ones are under way while tensor cores multiply the present one; one barrier a
// step. Warps share the tile, and with kSplit > 1 also the k of each step; their sums are then added in shared memory.
//
// Shared memory holds a row's kStepK bytes in 16-byte chunks, where chunk c of row r lies at c ^ swizzle(r): the eight
// rows that one ldmatrix phase reads, and the chunks of a row that eight threads write, cover all banks once.
//
// Rows of b take the slots of slot_of(): the fragment layout then gives a thread eight neighbouring columns of the
// output, which it stores with 16-byte accesses and without a detour through shared memory.

template <int kWarpsM_, int kWarpsN_, int kSplit_, int kFragsM_, int kFragsN_, int kStepK_, int kStages_>
struct TileShape {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kSplit = kSplit_;
  static constexpr int kFragsM = kFragsM_, kFragsN = kFragsN_;  // of 16 rows and of 8 columns, per warp
  static constexpr int kStepK = kStepK_, kStages = kStages_;
  static constexpr int kM = kWarpsM * kFragsM * 16, kN = kWarpsN * kFragsN * 8,
                       kThreads = kWarpsM * kWarpsN * kSplit * 32;
  static constexpr int kChunks = kStepK / 16, kStageBytes = (kM + kN) * kStepK;
  // Once the sums of a split are added, its warps take kOwned fragments of rows each.
  static constexpr int kOwned = kFragsM / kSplit;
  static constexpr int kSplitBytes = kSplit > 1 ? kThreads * kFragsM * kFragsN * 16 : 0;
  static constexpr int kOutlierBytes = kOutlierStep * (kM + kN) * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kFragsN % 4 == 0 && kFragsM % kSplit == 0 && kStepK % (32 * kSplit) == 0);
  static_assert(kThreads % kOutlierStep == 0 && kThreads % kChunks == 0);
  static_assert(kM * kChunks % kThreads == 0 && kN * kChunks % kThreads == 0);
  static_assert(kSharedBytes <= 48 << 10 && kSplitBytes <= kSharedBytes && kOutlierBytes <= kSharedBytes,
                "48 KiB are there without asking, on every architecture");
};

// 64 x 64 outputs a warp: 32 mma for 8 ldmatrix, and two blocks of four warps fill the registers of a multiprocessor.
using LargeTile = TileShape<2, 2, 1, 4, 8, 64, 3>;
// For more blocks where the large tile would leave multiprocessors idle.
using SmallTile = TileShape<2, 2, 1, 2, 4, 64, 4>;
// Up to 64 rows: 32 columns a block, so that there are enough blocks to draw the weights in at the memory's rate.
using SkinnyTile = TileShape<1, 1, 4, 4, 4, 128, 4>;

template <int kChunks>
__device__ constexpr int swizzle(int row) {
  return kChunks == 8 ? row % 8 : row / 2 % 4;  // 128 bytes, all banks, hold one row or two
}

// Column 8 t + 2 f + e of 32 is column 2 t + e of fragment f.
__device__ constexpr int slot_of(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

template <class Out, class Tile, bool kVector>
__global__ void __launch_bounds__(Tile::kThreads, 2) int8_gemm_tile_kernel(Int8Gemm p) {
  constexpr bool kExact = std::is_same_v<Out, int32_t>;
  constexpr int kFragsM = Tile::kFragsM, kFragsN = Tile::kFragsN, kChunks = Tile::kChunks, kOwned = Tile::kOwned;
  DYNAMIC_SHARED(int8_t, shared);
  // Blocks that follow each other take the same columns of the output: each part of the weight, the larger operand, is
  // read from memory once and then found in L2.
  const unsigned down = static_cast<unsigned>(ceil_div(p.m, Tile::kM));
  const int64_t m0 = static_cast<int64_t>(blockIdx.x % down) * Tile::kM;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / down) * Tile::kN;
  const int thread = threadIdx.x % Tile::kThreads, lane = thread % 32, warp = thread / 32;  // % tells nvcc the range
  const int split = warp % Tile::kSplit, warp_m = warp / Tile::kSplit % Tile::kWarpsM,
            warp_n = warp / Tile::kSplit / Tile::kWarpsM;
  const int k = static_cast<int>(p.k);  // at most kMaxK

  // ---- from memory: each thread brings one chunk of some rows of a and of b. Rows past the edge repeat the last one;
  // what comes of them is not stored.
  constexpr int kRowsAtOnce = Tile::kThreads / kChunks, kRowsOfA = Tile::kM / kRowsAtOnce,
                kRowsOfB = Tile::kN / kRowsAtOnce;
  const int fetched_row = thread / kChunks, fetched_chunk = thread % kChunks;
  const int rows_of_a = p.m - m0 < Tile::kM ? static_cast<int>(p.m - m0) : Tile::kM;
  const int rows_of_b = p.n - n0 < Tile::kN ? static_cast<int>(p.n - n0) : Tile::kN;
  const int8_t *a_first = p.a + m0 * p.k, *b_first = p.b + n0 * p.k;
  int a_offset[kRowsOfA], b_offset[kRowsOfB];  // at most 127 * kMaxK
  UNROLL for (int i = 0; i < kRowsOfA; ++i) a_offset[i] = min(fetched_row + i * kRowsAtOnce, rows_of_a - 1) * k;
  UNROLL for (int i = 0; i < kRowsOfB; ++i) b_offset[i] = min(fetched_row + i * kRowsAtOnce, rows_of_b - 1) * k;
  const auto fetch = [&](int step, int place) {
    const int k0 = step * Tile::kStepK + fetched_chunk * 16;
    const bool inside = k0 < k;
    int8_t* stage = shared + place * Tile::kStageBytes;
    const auto chunk = [&](int8_t* rows, int row, const int8_t* from) {
      int8_t* to = rows + row * Tile::kStepK + (fetched_chunk ^ swizzle<kChunks>(row)) * 16;
      if constexpr (kVector)
        cp_async_16(to, from, inside ? 16 : 0);
      else
        *reinterpret_cast<int4*>(to) = load_bytes(from, k - k0);
    };
    const int8_t *a = a_first + (inside ? k0 : 0), *b = b_first + (inside ? k0 : 0);
    UNROLL for (int i = 0; i < kRowsOfA; ++i) chunk(stage, fetched_row + i * kRowsAtOnce, a + a_offset[i]);
    UNROLL for (int i = 0; i < kRowsOfB; ++i) {
      chunk(stage + Tile::kM * Tile::kStepK, slot_of(fetched_row + i * kRowsAtOnce), b + b_offset[i]);
    }
  };

  // ---- main loop. The rows that a lane names to ldmatrix: of a, 16 rows by two chunks; of b, two fragments by two.
  const int a_row0 = warp_m * kFragsM * 16 + lane % 16, a_chunk = lane / 16;
  const int b_row0 = warp_n * kFragsN * 8 + lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
  int32_t acc[kFragsM][kFragsN][4] = {};
  const int steps = static_cast<int>(ceil_div(k, Tile::kStepK));
  UNROLL for (int step = 0; step < Tile::kStages - 1; ++step) {
    fetch(step, step);
    cp_async_commit();
  }
  int place = 0, next_place = Tile::kStages - 1;  // in the ring: of this step, and of the one to fetch
  NO_UNROLL for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step has arrived for all threads, and all have read the one before it
    fetch(step + Tile::kStages - 1, next_place);  // beyond k: zeros, which costs less than a branch
    cp_async_commit();
    const int8_t* a_stage = shared + place * Tile::kStageBytes;
    next_place = place;
    place = place + 1 == Tile::kStages ? 0 : place + 1;
    const int8_t* b_stage = a_stage + Tile::kM * Tile::kStepK;
    UNROLL for (int part = 0; part < Tile::kStepK / 32 / Tile::kSplit; ++part) {
      const int chunk = (part * Tile::kSplit + split) * 2;
      uint32_t b[kFragsN / 2][4];
      UNROLL for (int j = 0; j < kFragsN / 2; ++j) {
        const int row = b_row0 + j * 16;
        ldmatrix_x4(b[j], b_stage + row * Tile::kStepK + ((chunk + b_chunk) ^ swizzle<kChunks>(row)) * 16);
      }
      UNROLL for (int i = 0; i < kFragsM; ++i) {
        const int row = a_row0 + i * 16;
        uint32_t a[4];
        ldmatrix_x4(a, a_stage + row * Tile::kStepK + ((chunk + a_chunk) ^ swizzle<kChunks>(row)) * 16);
        UNROLL for (int j = 0; j < kFragsN; ++j) {
          const uint32_t of_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_int8(acc[i][j], a, of_b);
        }
      }
    }
  }

  // ---- add what the warps of a split have, and take over kOwned fragments of rows
  const int row0 = (warp_m * kFragsM + split * kOwned) * 16 + lane / 4;
  const int column0 = warp_n * kFragsN * 8 + lane % 4 * 8;
  cp_async_wait<0>();  // shared memory is used again from here on
  if constexpr (Tile::kSplit > 1) {
    __syncthreads();
    int4* sums = reinterpret_cast<int4*>(shared);  // [warps][kFragsM][kFragsN][32]
    UNROLL for (int i = 0; i < kFragsM; ++i) UNROLL for (int j = 0; j < kFragsN; ++j) {
      const int32_t* from = acc[i][j];
      sums[((warp * kFragsM + i) * kFragsN + j) * 32 + lane] = make_int4(from[0], from[1], from[2], from[3]);
    }
    __syncthreads();
    UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int j = 0; j < kFragsN; ++j) {
      int32_t total[4] = {};
      UNROLL for (int other = 0; other < Tile::kSplit; ++other) {
        const int from = warp - split + other;
        const int4 part = sums[((from * kFragsM + split * kOwned + i) * kFragsN + j) * 32 + lane];
        total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
      }
      UNROLL for (int e = 0; e < 4; ++e) acc[i][j][e] = total[e];
    }
  }

  // Eight neighbouring columns of a row: four fragments make them (slot_of).
  Out* out = static_cast<Out*>(p.out);
  const bool packs = p.n % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto store = [&](const Out(&values)[8], int64_t row, int64_t column) {
    if (row >= p.m || column >= p.n) return;
    Out* to = out + row * p.n + column;
    if (packs) {
      constexpr int kWidth = kExact ? 2 : kVectorWidth<Out>;  // accumulators lie in pairs: four would need moves
      UNROLL for (int part = 0; part < 8 / kWidth; ++part) {
        Pack<Out, kWidth> pack;
        UNROLL for (int e = 0; e < kWidth; ++e) pack.at[e] = values[part * kWidth + e];
        store_pack(to, part, pack);
      }
    } else {
      UNROLL for (int e = 0; e < 8; ++e) {
        if (column + e < p.n) to[e] = values[e];
      }
    }
  };
  if constexpr (kExact) {
    UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) {
      UNROLL for (int group = 0; group < kFragsN / 4; ++group) {
        Out values[8];
        UNROLL for (int e = 0; e < 8; ++e) values[e] = acc[i][group * 4 + e / 2][half * 2 + e % 2];
        store(values, m0 + row0 + i * 16 + half * 8, n0 + column0 + group * 32);
      }
    }
  } else {
    float v[kOwned][kFragsN][4];
    UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t row = m0 + row0 + i * 16 + half * 8;
      const float first = p.x == nullptr ? 1.0f : row < p.m ? p.a_scale[row * p.a_scale_stride] : 0.0f;
      UNROLL for (int j = 0; j < kFragsN; ++j) UNROLL for (int e = half * 2; e < half * 2 + 2; ++e) v[i][j][e] =
          scale_row(acc[i][j][e], first);
    }

    NO_UNROLL for (int pass = 0; pass < 2; ++pass) {
      const bool kept = pass == 1;
      if (kept) {
        float last[kOwned][2];
        UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) {
          const int64_t row = m0 + row0 + i * 16 + half * 8;
          last[i][half] = p.x != nullptr ? 1.0f : row < p.m ? p.a_scale[row * p.a_scale_stride] : 0.0f;
        }
        UNROLL for (int group = 0; group < kFragsN / 4; ++group) UNROLL for (int e = 0; e < 8; ++e) {
          const int64_t column = n0 + column0 + group * 32 + e;
          const float b_scale = column < p.n ? p.b_scale[column * p.b_scale_stride] : 0.0f;
          const float bias = column < p.n ? column_bias(p, column) : 0.0f;
          UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) {
            float& sum = v[i][group * 4 + e / 2][half * 2 + e % 2];
            sum = scale_column(sum, last[i][half] * b_scale, bias);
          }
        }
      }
      if (p.x == nullptr || (kept && p.outlier_slot == nullptr)) continue;
      const int32_t count = *p.count;
      const int c = thread % kOutlierStep;  // of the step's columns: the one that this thread stages
      NO_UNROLL for (int32_t c0 = 0; c0 < count; c0 += kOutlierStep) {
        const OutlierColumn outlier(p, c0 + c, count, kept);
        __syncthreads();  // the main loop, or the previous step, has been read
        // to(row, element number row * stride of `from`, or zero): rows past the edge repeat the last one again.
        const auto stage = [&](auto tile_rows, int rows, int64_t stride, const auto* from, const auto& to) {
          constexpr int kRowsStaged = Tile::kThreads / kOutlierStep, kRows = decltype(tile_rows)::value;
          UNROLL_BY_8 for (int row = thread / kOutlierStep; row < kRows; row += kRowsStaged)
              to(row, outlier.use ? from[min(row, rows - 1) * stride] : std::decay_t<decltype(*from)>{});
        };
        using M = std::integral_constant<int, Tile::kM>;
        using N = std::integral_constant<int, Tile::kN>;
        const Out* x = static_cast<const Out*>(p.x) + m0 * p.k + outlier.column;
        const int8_t* codes = p.b + n0 * p.k + outlier.column;
        const int64_t first_kept = outlier.use ? outlier.slot * p.n + n0 : 0;
        if (kMma16Bit<Out> && (!kept || p.outlier_weight_dtype == dtype_of<Out>::value)) {
          if constexpr (kMma16Bit<Out>) {
            // Rows of 16 elements, 48 bytes apart: eight of them cover all banks once.
            constexpr int kStride = 24;
            Out *x_tile = reinterpret_cast<Out*>(shared), *w_tile = x_tile + Tile::kM * kStride;
            const auto to_w = [&](int column, Out value) { w_tile[slot_of(column) * kStride + c] = value; };
            stage(M{}, rows_of_a, p.k, x, [&](int row, Out value) { x_tile[row * kStride + c] = value; });
            if (kept)
              stage(N{}, rows_of_b, 1, static_cast<const Out*>(p.outlier_weight) + first_kept, to_w);
            else
              stage(N{}, rows_of_b, p.k, codes,
                    [&](int column, int8_t code) { to_w(column, from_float<Out>(static_cast<float>(code))); });
            __syncthreads();
            uint32_t a[kOwned][4];
            UNROLL for (int i = 0; i < kOwned; ++i) {
              const int row = (warp_m * kFragsM + split * kOwned + i) * 16 + lane % 16;
              ldmatrix_x4(a[i], x_tile + row * kStride + a_chunk * 8);
            }
            UNROLL for (int j = 0; j < kFragsN; j += 2) {
              uint32_t b[4];
              ldmatrix_x4(b, w_tile + (b_row0 + j * 8) * kStride + b_chunk * 8);
              UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int f = 0; f < 2; ++f) {
                const uint32_t of_b[2] = {b[f * 2], b[f * 2 + 1]};
                mma_16bit<Out>(v[i][j + f], a[i], of_b);
              }
            }
          }
        } else {  // fp32, and what this architecture's tensor cores do not take
          float *x_tile = reinterpret_cast<float*>(shared), *w_tile = x_tile + kOutlierStep * Tile::kM;
          const auto to_w = [&](int column, auto value) { w_tile[c * Tile::kN + column] = to_float(value); };
          stage(M{}, rows_of_a, p.k, x, [&](int row, Out value) { x_tile[c * Tile::kM + row] = to_float(value); });
          if (kept)
            dispatch_float(p.outlier_weight_dtype, [&](auto type) {
              stage(N{}, rows_of_b, 1, static_cast<const decltype(type)*>(p.outlier_weight) + first_kept, to_w);
            });
          else
            stage(N{}, rows_of_b, p.k, codes, [&](int column, int8_t code) { to_w(column, static_cast<float>(code)); });
          __syncthreads();
          NO_UNROLL for (int step = 0; step < kOutlierStep && c0 + step < count; ++step) {
            float from_x[kOwned][2];
            UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) from_x[i][half] =
                x_tile[step * Tile::kM + row0 + i * 16 + half * 8];
            UNROLL for (int group = 0; group < kFragsN / 4; ++group) {
              const auto w = load_pack<8>(w_tile, (step * Tile::kN + column0 + group * 32) / 8);
              UNROLL for (int e = 0; e < 8; ++e) UNROLL for (int i = 0; i < kOwned; ++i) {
                UNROLL for (int half = 0; half < 2; ++half) {
                  float& sum = v[i][group * 4 + e / 2][half * 2 + e % 2];
                  sum = fmaf(from_x[i][half], w.at[e], sum);
                }
              }
            }
          }
        }
      }
    }

    UNROLL for (int i = 0; i < kOwned; ++i) UNROLL for (int half = 0; half < 2; ++half) {
      UNROLL for (int group = 0; group < kFragsN / 4; ++group) {
        Out values[8];
        UNROLL for (int e = 0; e < 8; ++e) values[e] = from_float<Out>(v[i][group * 4 + e / 2][half * 2 + e % 2]);
        store(values, m0 + row0 + i * 16 + half * 8, n0 + column0 + group * 32);
      }
    }
  }
}

// ---- few rows ----
//
// Bound by reading the weight once. A block takes 16 columns of the output and up to 16 rows of a; its warps share k in
// spans of 64 bytes. Fragments come straight from memory: a product is the same in any order of k, so a lane takes 16
// neighbouring bytes of its row of b, and of its rows of a, as its words of two mma. At 16 rows tensor cores need a
// tenth of the time that the memory does.

constexpr int kFewRows = 16, kFewColumns = 16, kFewWarps = 8, kFewSpan = 64;
constexpr int kFewAhead = 4;  // spans a lane has under way: 8 KiB a warp

template <class Out, bool kVector>
__global__ void __launch_bounds__(kFewWarps * 32, 2) int8_gemm_few_rows_kernel(Int8Gemm p) {
  constexpr bool kExact = std::is_same_v<Out, int32_t>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m = static_cast<int>(p.m), k = static_cast<int>(p.k);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kFewColumns;

  // Rows past the edge repeat the last one; what comes of them is not stored.
  const int8_t *a_row[2], *b_row[2];
  UNROLL for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    const int64_t j = n0 + row;
    a_row[half] = p.a + min(row, m - 1) * p.k;
    b_row[half] = p.b + (j < p.n ? j : p.n - 1) * p.k;
  }
  int32_t acc[2][4] = {};
  const auto multiply = [&](const int4(&a)[2], const int4(&b)[2]) {
    const auto word = [](int bits) { return static_cast<uint32_t>(bits); };
    UNROLL for (int half = 0; half < 2; ++half) {
      mma_int8(acc[half], {word(a[0].x), word(a[1].x), word(a[0].y), word(a[1].y)}, {word(b[half].x), word(b[half].y)});
      mma_int8(acc[half], {word(a[0].z), word(a[1].z), word(a[0].w), word(a[1].w)}, {word(b[half].z), word(b[half].w)});
    }
  };
  constexpr int kBlockSpan = kFewWarps * kFewSpan;
  int k0 = warp * kFewSpan + lane % 4 * 16;  // this lane's bytes of its warp's span
  if constexpr (kVector) {
    // The whole block takes this loop the same number of times: while every warp's spans lie inside.
    NO_UNROLL for (int end = kFewAhead * kBlockSpan; end <= k; end += kFewAhead * kBlockSpan) {
      int4 a[kFewAhead][2], b[kFewAhead][2];
      UNROLL for (int ahead = 0; ahead < kFewAhead; ++ahead) UNROLL for (int half = 0; half < 2; ++half) {
        b[ahead][half] = __ldcs(reinterpret_cast<const int4*>(b_row[half] + k0 + ahead * kBlockSpan));  // read once
        a[ahead][half] = *reinterpret_cast<const int4*>(a_row[half] + k0 + ahead * kBlockSpan);
      }
      UNROLL for (int ahead = 0; ahead < kFewAhead; ++ahead) multiply(a[ahead], b[ahead]);
      k0 += kFewAhead * kBlockSpan;
    }
  }
  // What is left. A warp's lanes stay together: beyond k they multiply zeros.
  NO_UNROLL for (; k0 - lane % 4 * 16 < k; k0 += kBlockSpan) {
    int4 a[2] = {}, b[2] = {};
    UNROLL for (int half = 0; half < 2; ++half) {
      if constexpr (kVector) {
        if (k0 >= k) continue;
        b[half] = __ldcs(reinterpret_cast<const int4*>(b_row[half] + k0));
        a[half] = *reinterpret_cast<const int4*>(a_row[half] + k0);
      } else {
        b[half] = load_bytes(b_row[half] + k0, k - k0);
        a[half] = load_bytes(a_row[half] + k0, k - k0);
      }
    }
    multiply(a, b);
  }

  // Half of the columns change places in every other pair of rows: what half a warp stores, and what a warp then reads,
  // covers all banks once.
  SHARED(int32_t, sums, [kFewWarps][kFewRows][kFewColumns]);
  const auto place = [](int row, int column) { return column ^ row / 2 % 2 * 8; };
  UNROLL for (int half = 0; half < 2; ++half) UNROLL for (int e = 0; e < 4; e += 2) {
    const int row = lane / 4 + e * 4;
    *reinterpret_cast<int2*>(&sums[warp][row][place(row, half * 8 + lane % 4 * 2)]) =
        make_int2(acc[half][e], acc[half][e + 1]);
  }
  __syncthreads();
  const int row = thread / kFewColumns, column = thread % kFewColumns;  // of the output that is now this thread's
  const int64_t j = n0 + column;
  const bool inside = row < m && j < p.n;
  int32_t sum = 0;
  UNROLL for (int from = 0; from < kFewWarps; ++from) sum += sums[from][row][place(row, column)];

  Out* out = static_cast<Out*>(p.out);
  if constexpr (kExact) {
    if (inside) out[row * p.n + j] = sum;
  } else {
    SHARED(float, x_tile, [kOutlierStep][kFewRows + 1]);
    SHARED(float, w_tile, [kOutlierStep][kFewColumns + 1]);
    const float a_scale = inside ? p.a_scale[row * p.a_scale_stride] : 0.0f;
    float v = scale_row(sum, p.x != nullptr ? a_scale : 1.0f);
    NO_UNROLL for (int pass = 0; pass < 2; ++pass) {
      const bool kept = pass == 1;
      if (kept && inside) {
        const float last = p.x != nullptr ? 1.0f : a_scale;
        v = scale_column(v, last * p.b_scale[j * p.b_scale_stride], column_bias(p, j));
      }
      if (p.x == nullptr || (kept && p.outlier_slot == nullptr)) continue;
      const Out* x = static_cast<const Out*>(p.x);
      const int32_t count = *p.count;
      NO_UNROLL for (int32_t c0 = 0; c0 < count; c0 += kOutlierStep) {
        static_assert(kFewRows == kFewColumns && kOutlierStep == kFewColumns,
                      "a thread stages one of x and one weight");
        const OutlierColumn outlier(p, c0 + column, count, kept);
        __syncthreads();  // the previous step has been read
        float weight = 0.0f;
        if (outlier.use && n0 + row < p.n)
          weight = kept ? load_float(p.outlier_weight, p.outlier_weight_dtype, outlier.slot * p.n + n0 + row)
                        : static_cast<float>(p.b[(n0 + row) * p.k + outlier.column]);
        x_tile[column][row] = outlier.use && row < m ? to_float(x[row * p.k + outlier.column]) : 0.0f;
        w_tile[column][row] = weight;
        __syncthreads();
        UNROLL for (int c = 0; c < kOutlierStep; ++c) v = fmaf(x_tile[c][row], w_tile[c][column], v);
      }
    }
    if (inside) out[row * p.n + j] = from_float<Out>(v);
  }
}

// ---- choice ----

template <class Out, class Tile, bool kVector>
void launch_tiles(const Int8Gemm& p, Stream stream) {
  auto kernel = int8_gemm_tile_kernel<Out, Tile, kVector>;
  const auto tiles = static_cast<unsigned>(ceil_div(p.m, Tile::kM) * ceil_div(p.n, Tile::kN));
  LAUNCH(kernel, dim3(tiles), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p);
}

template <class Out>
void launch_gemm(const Int8Gemm& p, Stream stream) {
  const bool vector = packable(p.a, p.k, 16) && packable(p.b, p.k, 16);
  if (p.m <= kFewRows) {
    auto kernel = vector ? int8_gemm_few_rows_kernel<Out, true> : int8_gemm_few_rows_kernel<Out, false>;
    const auto blocks = static_cast<unsigned>(ceil_div(p.n, kFewColumns));
    LAUNCH(kernel, dim3(blocks), dim3(kFewWarps * 32), 0, stream, p);
    return;
  }
  if (!vector) return launch_tiles<Out, SmallTile, false>(p, stream);
  const int available = multiprocessors();
  const auto enough = [&](int64_t tile_m, int64_t tile_n) {
    return ceil_div(p.m, tile_m) * ceil_div(p.n, tile_n) >= available;
  };
  if (p.m > SkinnyTile::kM && enough(LargeTile::kM, LargeTile::kN))
    return launch_tiles<Out, LargeTile, true>(p, stream);
  if (p.m > SkinnyTile::kM || enough(SmallTile::kM, SmallTile::kN))
    return launch_tiles<Out, SmallTile, true>(p, stream);
  launch_tiles<Out, SkinnyTile, true>(p, stream);
}

void int8_gemm(const Int8Gemm& p, Stream stream) {
  if (p.m == 0 || p.n == 0) return;
  if (p.out_dtype == DType::i32) return launch_gemm<int32_t>(p, stream);
  dispatch_float(p.out_dtype, [&](auto element) { launch_gemm<decltype(element)>(p, stream); });
}

}  // namespace octavo::GPU_NS
