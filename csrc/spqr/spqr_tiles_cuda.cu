// More than 16 rows of x, in 16 bits: a product of tiles on tensor cores, whose weights are decoded on the way.
//
// A block computes kM x kN outputs. Steps of kStepK columns of x and of code words travel to shared memory by cp.async,
// three of them in a ring. While the tensor cores multiply one step, each thread decodes its piece of the next: one row
// and one chunk of the weight, with statistics, unit and outliers in fp32, rounded once: what spqr_dequantize gives.
// The decoded tile has two places, so that there is one barrier a step.
#include "common/tile.h"
#include "spqr/decode_gpu.h"
#include "spqr/work_gpu.h"

namespace octavo::GPU_NS {

template <int kFragsM_, int kFragsN_, int kChunks_>
struct SpqrTile {
  static constexpr int kFragsM = kFragsM_,
                       kFragsN = kFragsN_;  // of 16 rows of x and of 8 columns, of each of 2 x 2 warps
  static constexpr int kM = 2 * kFragsM * 16, kN = 2 * kFragsN * 8, kThreads = 128, kStages = 3;
  static constexpr int kChunks = kChunks_;  // of columns in a step
  static constexpr int kRowBytes = kChunks * 64, kPieces = kRowBytes / 16;
  static constexpr int kBytesOfX = kM * kRowBytes, kBytesOfW = kN * kRowBytes;
  static_assert(kN * kChunks == kThreads && kFragsN % 4 == 0, "a thread decodes one row of a chunk");
  // Rows of tiles of 16 follow each other at an odd multiple of 64 bytes: two of them are a warp's rows, in all banks.
  template <int kBits>
  static constexpr int kCodeTile = (kChunks * kBits | 1) * 64;
  template <int kBits>
  static constexpr int kStageBytes = kBytesOfX + kN / 16 * kCodeTile<kBits>;
  template <int kBits>
  static constexpr int kSharedBytes = kStages * kStageBytes<kBits> + 2 * kBytesOfW;
  static_assert(kSharedBytes<4> <= 48 << 10, "48 KiB are there without asking, on every architecture");
};

// 64 x 64 outputs a warp: 64 mma for each 32 weights that a thread decodes.
using SpqrLargeTile = SpqrTile<4, 8, 1>;
// For more blocks where the large tile would leave multiprocessors idle.
using SpqrSmallTile = SpqrTile<2, 4, 2>;

// Where piece `piece` (16 bytes) of a row lies: the eight rows of an ldmatrix, and the eight that threads next to each
// other write (spqr_slot_of: two of each eight), then cover all banks once.
template <class Tile>
__device__ __forceinline__ int place_of(int row, int piece) {
  return row * Tile::kRowBytes +
         (piece ^ (Tile::kPieces == 8 ? (row ^ row / 8 * 2) % 8 : (row / 2 ^ row / 8) % 4)) * 16;
}

// Column 8 t + 2 f + e of 32 is column 2 t + e of fragment f: a thread ends up with eight neighbouring columns.
__device__ constexpr int spqr_slot_of(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

template <class T, int kBits, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) spqr_tile_kernel(SpqrMatmul p, SpqrStaged at) {
  constexpr int kFragsM = Tile::kFragsM, kFragsN = Tile::kFragsN;
  constexpr int kStage = Tile::template kStageBytes<kBits>, kCodeTile = Tile::template kCodeTile<kBits>;
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const decoded = shared + Tile::kStages * kStage;  // [2][kN][kRowBytes]
  const SpqrWeight& w = p.w;
  // Blocks that follow each other take the same columns of the output: the weight is then read from memory once.
  const unsigned down = static_cast<unsigned>(ceil_div(p.m, Tile::kM));
  const int64_t m0 = static_cast<int64_t>(blockIdx.x % down) * Tile::kM;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / down) * Tile::kN;
  const int thread = threadIdx.x % Tile::kThreads, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % 2, warp_n = warp / 2;
  const int chunks = static_cast<int>((w.k + 31) >> 5);
  const int steps = (chunks + Tile::kChunks - 1) / Tile::kChunks;

  // ---- from memory: pieces of 16 bytes. Rows of x past the edge repeat the last one; what comes of them is not
  // stored.
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kPieces;
  const int fetched_piece = thread % Tile::kPieces, rows = p.m - m0 < Tile::kM ? static_cast<int>(p.m - m0) : Tile::kM;
  const auto* x = static_cast<const unsigned char*>(p.workspace) + m0 * at.chunks * 64 + fetched_piece * 16;
  const int code_row = thread / (Tile::kChunks * kBits * 4), code_piece = thread % (Tile::kChunks * kBits * 4);
  const int64_t code_tile = n0 / kTileRows16 + code_row;
  const bool brings_codes = thread < Tile::kN / 16 * Tile::kChunks * kBits * 4;
  const bool code_tile_inside = code_tile * kTileRows16 < w.n;
  const auto* codes =
      reinterpret_cast<const unsigned char*>(spqr_codes(w, code_tile_inside ? code_tile : 0, 0)) + code_piece * 16;
  const bool aligned = reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
  const auto fetch = [&](int step, int place) {
    unsigned char* stage = shared + place * kStage;
    const int64_t first = static_cast<int64_t>(step) * Tile::kChunks;
    const int bytes = step < steps ? 16 : 0;
    UNROLL for (int i = 0; i < Tile::kM / kRowsAtOnce; ++i) {
      const int row = thread / Tile::kPieces + i * kRowsAtOnce;
      cp_async_16(stage + place_of<Tile>(row, fetched_piece), x + (min(row, rows - 1) * at.chunks + first) * 64, bytes);
    }
    if (brings_codes) {
      const bool inside = code_tile_inside && first + code_piece / (kBits * 4) < chunks;
      copy_piece(stage + Tile::kBytesOfX + code_row * kCodeTile + code_piece * 16, codes + first * (kBits * 64),
                 inside ? 16 : 0, aligned);
    }
  };

  // ---- decoding: this thread's row of the weight, and its chunk of a step
  const int own_row = thread % Tile::kN, own_chunk = thread / Tile::kN, r = own_row % 16;
  const int64_t own_n = n0 + own_row < w.n ? n0 + own_row : w.n - 1;  // rows past the edge: not stored
  const int64_t own_tile = own_n / kTileRows16;
  const int group_shift = w.group_size == 64 ? 2 : w.group_size == 32 ? 1 : 0;
  const int64_t groups = w.k >> (4 + group_shift), second_row = second_order_row(w, own_tile);
  const FieldShape fields(w);
  const float unit = *w.unit;
  RawStatistics raw[2];
  const auto load_statistics = [&](int step) {
    UNROLL for (int half = 0; half < 2; ++half) {
      int64_t group = ((static_cast<int64_t>(step) * Tile::kChunks + own_chunk) * 2 + half) >> group_shift;
      if (group >= groups) group = groups - 1;  // beyond k: multiplied by zeros
      raw[half].load(w, own_tile, static_cast<int>(own_n % kTileRows16), group, groups, second_row);
    }
  };
  int64_t outlier = 0, outlier_end = 0;
  SpqrOutlier next{w.k + Tile::kChunks * 32, 0.0f};  // none
  if (w.row_offsets != nullptr) {
    outlier = w.row_offsets[own_n], outlier_end = w.row_offsets[own_n + 1];
    if (outlier < outlier_end) next = spqr_outlier(w, outlier);
  }
  const auto decode = [&](int step, int place) {
    const auto* words = reinterpret_cast<const uint32_t*>(shared + place * kStage + Tile::kBytesOfX +
                                                          own_row / 16 * kCodeTile + own_chunk * (kBits * 64)) +
                        r;
    unsigned char* tile = decoded + step % 2 * Tile::kBytesOfW;
    const int slot = spqr_slot_of(own_row);
    uint32_t planes[kBits];
    UNROLL for (int i = 0; i < kBits; ++i) planes[i] = words[i * 16];
    SpqrStatistics s[2];
    UNROLL for (int half = 0; half < 2; ++half) s[half] = raw[half].decode(w, fields);
    load_statistics(step + 1);
    const auto weight = [&](int half, float code, float more) {
      return unit * (s[half].scale * (code - s[half].zero) + more);
    };
    UNROLL for (int piece = 0; piece < 4; ++piece) {
      Pack<uint32_t, 4> pack;
      UNROLL for (int e = 0; e < 4; ++e) {
        const uint32_t pair = code_pair<Half, kBits>(planes, piece * 4 + e);
        const auto dense = [&](uint32_t code) {
          return unit * (s[piece / 2].scale * (to_float(Half{static_cast<uint16_t>(code)}) - s[piece / 2].zero));
        };
        pack.at[e] = round_pair<T>(dense(pair), dense(pair >> 16));
      }
      *reinterpret_cast<Pack<uint32_t, 4>*>(tile + place_of<Tile>(slot, own_chunk * 4 + piece)) = pack;
    }
    // A weight that has an outlier is made again: it is rounded once.
    const int64_t column0 = (static_cast<int64_t>(step) * Tile::kChunks + own_chunk) * 32;
    while (next.column < column0 + 32 && outlier < outlier_end) {
      const int of_chunk = static_cast<int>(next.column - column0);
      if (of_chunk >= 0) {
        const uint32_t pair = spqr_pair(kBits, words, 16, of_chunk / 2);
        const float code = static_cast<float>(pair >> of_chunk % 2 * 16 & 0xffffu);
        const float value = of_chunk < 16 ? weight(0, code, next.value) : weight(1, code, next.value);
        reinterpret_cast<T*>(tile + place_of<Tile>(slot, own_chunk * 4 + of_chunk / 8))[of_chunk % 8] =
            from_float<T>(value);
      }
      if (++outlier < outlier_end) next = spqr_outlier(w, outlier);
    }
  };

  // ---- main loop. The rows that a lane names to ldmatrix: of x, 16 rows by two pieces; of w, two fragments by two.
  const int x_row0 = warp_m * kFragsM * 16 + lane % 16, x_piece = lane / 16;
  const int w_row0 = warp_n * kFragsN * 8 + lane / 16 * 8 + lane % 8, w_piece = lane / 8 % 2;
  float acc[kFragsM][kFragsN][4] = {};
  if (steps > 0) {
    UNROLL for (int step = 0; step < 2; ++step) {
      fetch(step, step);
      cp_async_commit();
    }
    load_statistics(0);
    cp_async_wait<1>();
    __syncthreads();
    decode(0, 0);
  }
  int place = 0;  // of this step in the ring
  NO_UNROLL for (int step = 0; step < steps; ++step) {
    const int next_place = place == 2 ? 0 : place + 1, free_place = place == 0 ? 2 : place - 1;
    cp_async_wait<0>();
    __syncthreads();  // the next step has arrived, this one is decoded, and all have multiplied the one before it
    fetch(step + 2, free_place);
    cp_async_commit();
    if (step + 1 < steps) decode(step + 1, next_place);
    const unsigned char *x_tile = shared + place * kStage, *w_tile = decoded + step % 2 * Tile::kBytesOfW;
    UNROLL for (int part = 0; part < Tile::kChunks * 2; ++part) {
      uint32_t b[kFragsN / 2][4];
      UNROLL for (int j = 0; j < kFragsN / 2; ++j)
          ldmatrix_x4(b[j], w_tile + place_of<Tile>(w_row0 + j * 16, part * 2 + w_piece));
      UNROLL for (int i = 0; i < kFragsM; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, x_tile + place_of<Tile>(x_row0 + i * 16, part * 2 + x_piece));
        UNROLL for (int j = 0; j < kFragsN; ++j) {
          const uint32_t of_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_16bit<T>(acc[i][j], a, of_b);
        }
      }
    }
    place = next_place;
  }
  cp_async_wait<0>();

  // ---- bias, the output's dtype, eight neighbouring columns of a row: four fragments make them
  T* out = static_cast<T*>(p.out);
  const bool packs = p.w.n % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  UNROLL for (int group = 0; group < kFragsN / 4; ++group) {
    const int64_t column = n0 + warp_n * kFragsN * 8 + lane % 4 * 8 + group * 32;
    if (column >= w.n) continue;
    float bias[8] = {};
    if (p.bias != nullptr) {
      UNROLL for (int e = 0; e < 8; ++e) {
        if (column + e < w.n) bias[e] = load_float(p.bias, p.bias_dtype, column + e);
      }
    }
    UNROLL for (int i = 0; i < kFragsM; ++i) UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t row = m0 + warp_m * kFragsM * 16 + lane / 4 + i * 16 + half * 8;
      if (row >= p.m) continue;
      Pack<T, 8> pack;
      UNROLL for (int e = 0; e < 8; ++e) pack.at[e] =
          from_float<T>(acc[i][group * 4 + e / 2][half * 2 + e % 2] + bias[e]);
      T* to = out + row * w.n + column;
      if (packs) {
        store_pack(to, 0, pack);
      } else {
        UNROLL for (int e = 0; e < 8; ++e) {
          if (column + e < w.n) to[e] = pack.at[e];
        }
      }
    }
  }
}

template <class T, int kBits, class Tile>
void launch_tiles(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  auto kernel = spqr_tile_kernel<T, kBits, Tile>;
  const auto tiles = static_cast<unsigned>(ceil_div(p.m, Tile::kM) * ceil_div(p.w.n, Tile::kN));
  LAUNCH(kernel, dim3(tiles), dim3(Tile::kThreads), Tile::template kSharedBytes<kBits>, stream, p, staged);
}

template <class T, int kBits>
void choose_tile(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  const bool large = p.m > SpqrSmallTile::kM &&
                     ceil_div(p.m, SpqrLargeTile::kM) * ceil_div(p.w.n, SpqrLargeTile::kN) >= multiprocessors();
  large ? launch_tiles<T, kBits, SpqrLargeTile>(p, staged, stream)
        : launch_tiles<T, kBits, SpqrSmallTile>(p, staged, stream);
}

void spqr_tiles(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {  // fp32 streams
      switch (p.w.bits) {
        case 2: return choose_tile<T, 2>(p, staged, stream);
        case 3: return choose_tile<T, 3>(p, staged, stream);
        default: return choose_tile<T, 4>(p, staged, stream);
      }
    }
  });
}

}  // namespace octavo::GPU_NS
