// More than 16 rows of x in 16 bits, and the transposed product: tiles on tensor cores, whose weights are decoded on
// the way. A block computes kM x kN outputs, for all of `inner` or for a part of it.
//
// Steps of kStepK of `inner` travel to shared memory by cp.async, three of them in a ring. While the tensor cores
// multiply one step, each thread decodes its 32 codes of the next, which it loaded two steps before: what dequantizing
// gives, by a table of the 16 values times absmax. The decoded tile has two places, so that there is one barrier a
// step.
//
// The product with the weight has rows of the weight in rows of the decoded tile, the transposed one rows of `inner`,
// which ldmatrix then transposes; either way a row holds columns of the weight as they are in memory.
#include "common/ptx.h"
#include "nf4/decode_gpu.h"
#include "nf4/work_gpu.h"

namespace octavo::GPU_NS {

template <int kWarpsM_, int kWarpsN_, int kFragsM_, int kFragsN_, int kStepK_>
struct Nf4Tile {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStepK = kStepK_;
  static constexpr int kFragsM = kFragsM_, kFragsN = kFragsN_;  // of 16 rows of x and of 8 columns, of each warp
  static constexpr int kM = kWarpsM * kFragsM * 16, kN = kWarpsN * kFragsN * 8, kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kStages = 3, kBytesOfX = kM * kStepK * 2, kBytesOfW = kN * kStepK * 2;
  static constexpr int kSharedBytes = kStages * kBytesOfX + 2 * kBytesOfW;
  static_assert(kN * kStepK == kThreads * 32 && kFragsN % 4 == 0, "a thread decodes 32 codes");
  static_assert(kSharedBytes <= 48 << 10, "48 KiB are there without asking, on every architecture");
};

// 64 x 64 outputs a warp: 64 mma for each 32 weights that a thread decodes.
using Nf4LargeTile = Nf4Tile<2, 2, 4, 8, 32>;
// For more blocks where the large tile would leave multiprocessors idle.
using Nf4SmallTile = Nf4Tile<2, 2, 2, 4, 64>;
// The transposed product of up to 16 rows: the weight streams through.
using Nf4SkinnyTile = Nf4Tile<1, 4, 1, 4, 32>;

// Where piece `piece` (16 bytes) of a row lies: the eight rows of an ldmatrix, and what eight threads next to each
// other write, then cover all banks once. Those write rows that nf4_slot_of spreads, or half-rows of 32 bytes in fours.
template <int kRowBytes>
__device__ __forceinline__ int place_of(int row, int piece) {
  if (kRowBytes == 256) return row * kRowBytes + (piece ^ (row ^ piece / 8 * 2) % 8) * 16;
  if (kRowBytes == 128) return row * kRowBytes + (piece ^ (row ^ row / 8 * 2) % 8) * 16;
  return row * kRowBytes + (piece ^ (row / 2 ^ row / 8) % 4) * 16;
}

// Column 8 t + 2 f + e of 32 is column 2 t + e of fragment f: a thread ends up with eight neighbouring columns.
__device__ constexpr int nf4_slot_of(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// 32 neighbouring codes of a row of the weight, and their absmax, as they are in memory.
struct RawCodes {
  uint4 words;
  RawAbsmax absmax;
};

template <class T, class Tile, bool kTransposed, bool kWholeRows>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kM == 128 ? 2 : 3)
    nf4_tile_kernel(Nf4Matmul p, CodeBook book, Nf4Plan plan) {
  constexpr int kFragsM = Tile::kFragsM, kFragsN = Tile::kFragsN, kStepK = Tile::kStepK;
  constexpr int kXRow = kStepK * 2, kWRow = kTransposed ? Tile::kN * 2 : kStepK * 2;  // bytes in shared memory
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const decoded = shared + Tile::kStages * Tile::kBytesOfX;  // [2][rows][kWRow]
  const LowBitTensor& w = p.w;
  // Blocks that follow each other take the same part of the weight: it is then read from memory once.
  const unsigned down = static_cast<unsigned>(ceil_div(p.m, Tile::kM));
  const int64_t m0 = static_cast<int64_t>(blockIdx.x % down) * Tile::kM;
  const unsigned split = blockIdx.x / down % static_cast<unsigned>(plan.splits);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / down / static_cast<unsigned>(plan.splits)) * Tile::kN;
  const int thread = threadIdx.x % Tile::kThreads, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % Tile::kWarpsM, warp_n = warp / Tile::kWarpsM;
  const int64_t begin = static_cast<int64_t>(split) * plan.steps_per_split * kNf4Step;
  const int64_t end = begin + static_cast<int64_t>(plan.steps_per_split) * kNf4Step;  // the last part: or inner
  const int steps = static_cast<int>(ceil_div((end < plan.inner ? end : plan.inner) - begin, kStepK));

  // ---- x from memory: pieces of 16 bytes. Rows past the edge repeat the last one; what comes of them is not stored.
  constexpr int kPieces = kXRow / 16, kRowsAtOnce = Tile::kThreads / kPieces;
  constexpr int kRowsOfX = static_cast<int>(ceil_div(Tile::kM, kRowsAtOnce));  // that a thread brings
  const int fetched_piece = thread % kPieces, rows = p.m - m0 < Tile::kM ? static_cast<int>(p.m - m0) : Tile::kM;
  const bool vector = plan.inner % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const int64_t x_left = plan.inner - begin - fetched_piece * 8;
  const int x_steps = x_left > 0 ? min(static_cast<int>(ceil_div(x_left, kStepK)), steps) : 0;  // with such a piece
  const T* x = static_cast<const T*>(p.x) + m0 * plan.inner + begin + fetched_piece * 8;        // of the next step
  int64_t x_row[kRowsOfX];
  UNROLL for (int i = 0; i < kRowsOfX; ++i) x_row[i] = min(thread / kPieces + i * kRowsAtOnce, rows - 1) * plan.inner;
  const auto fetch = [&](int step, int place) {  // one step after the other
    UNROLL for (int i = 0; i < kRowsOfX; ++i) {
      const int row = thread / kPieces + i * kRowsAtOnce;
      if (Tile::kM % kRowsAtOnce != 0 && row >= Tile::kM) break;
      unsigned char* to = shared + place * Tile::kBytesOfX + place_of<kXRow>(row, fetched_piece);
      if (vector) {
        cp_async_16(to, step < x_steps ? x + x_row[i] : p.x, step < x_steps ? 16 : 0);
      } else {
        const int64_t left = step < x_steps ? x_left - static_cast<int64_t>(step) * kStepK : 0;
        NO_UNROLL for (int e = 0; e < 8; ++e) reinterpret_cast<T*>(to)[e] = e < left ? x[x_row[i] + e] : T{};
      }
    }
    x += kStepK;
  };

  // ---- the weight: this thread's row of the decoded tile, and its 32 columns. Past an edge of `inner` x is zeros, and
  // the weight must be finite. Past the other, what comes of it is not stored.
  constexpr int kChunks = kTransposed ? Tile::kN / 32 : kStepK / 32;
  const int own_row = kTransposed ? thread / kChunks : thread % Tile::kN;
  const int own_chunk = kTransposed ? thread % kChunks : thread / Tile::kN;
  const int64_t row0 = kTransposed ? begin + own_row : n0 + own_row;
  const int64_t column0 = (kTransposed ? n0 : begin) + own_chunk * 32;
  const int log2_blocksize = __ffs(static_cast<int>(w.blocksize)) - 1;
  const float offset = offset_of(w);
  const int64_t w_left = (kTransposed ? column0 < p.k : row0 < p.n) ? plan.inner - (kTransposed ? row0 : column0) : 0;
  const int w_steps = w_left > 0 ? min(static_cast<int>(ceil_div(w_left, kStepK)), steps) : 0;
  int64_t at = row0 * p.k + column0;  // of the next step
  const auto load = [&](int step) {   // one step after the other
    RawCodes raw{};
    if (step < w_steps) {
      raw.words = reinterpret_cast<const uint4*>(w.packed)[at >> 5];
      raw.absmax.load(w, at >> log2_blocksize);
    }
    at += kTransposed ? kStepK * p.k : kStepK;
    return raw;
  };
  // pair(i): columns 2 i and 2 i + 1 of the 32. In the transposed product the tile's columns are those of the output:
  // pairs that will be a fragment's lie together.
  const auto store = [&](int step, const auto& pairs) {
    unsigned char* tile = decoded + step % 2 * Tile::kBytesOfW;
    const int slot = kTransposed ? own_row : nf4_slot_of(own_row);
    UNROLL for (int piece = 0; piece < 4; ++piece) {
      Pack<uint32_t, 4> pack;
      UNROLL for (int e = 0; e < 4; ++e) pack.at[e] = pairs[kTransposed ? 4 * e + piece : 4 * piece + e];
      *reinterpret_cast<Pack<uint32_t, 4>*>(tile + place_of<kWRow>(slot, own_chunk * 4 + piece)) = pack;
    }
  };
  const auto decode = [&](int step, const RawCodes& raw) {
    const BytePlanes<2> planes = scaled_planes<T>(book, raw.absmax.decode(w, offset));
    const uint32_t words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
    uint32_t pairs[16];
    UNROLL for (int i = 0; i < 4; ++i) {
      const Quads quads(words[i]);
      UNROLL for (int half = 0; half < 2; ++half) quads.half[half].pairs(planes, pairs[4 * i + 2 * half],
                                                                         pairs[4 * i + 2 * half + 1]);
    }
    store(step, pairs);
  };
  const auto decode_slowly = [&](int step) {
    const LowBitReader value(w);
    const int64_t moved = static_cast<int64_t>(step) * kStepK;
    const int64_t row = kTransposed ? row0 + moved : row0 < p.n ? row0 : p.n - 1;
    const int64_t column = kTransposed ? column0 : column0 + moved;
    unsigned char* tile = decoded + step % 2 * Tile::kBytesOfW;
    const int slot = kTransposed ? own_row : nf4_slot_of(own_row);
    NO_UNROLL for (int i = 0; i < 16; ++i) {
      float v[2];
      UNROLL for (int e = 0; e < 2; ++e) {
        const int64_t at = column + 2 * i + e;
        v[e] = row < p.n && at < p.k ? value(row * p.k + at) : 0.0f;
      }
      const int piece = kTransposed ? i % 4 : i / 4, word = kTransposed ? i / 4 : i % 4;
      reinterpret_cast<uint32_t*>(tile + place_of<kWRow>(slot, own_chunk * 4 + piece))[word] =
          round_pair<T>(v[0], v[1]);
    }
  };

  // ---- main loop. The rows that a lane names to ldmatrix: of x, 16 rows by two pieces; of w, two fragments by two.
  const int x_row0 = warp_m * kFragsM * 16 + lane % 16, x_piece = lane / 16;
  const int w_row0 = kTransposed ? lane % 16 : warp_n * kFragsN * 8 + lane / 16 * 8 + lane % 8;
  const int w_piece = kTransposed ? warp_n * kFragsN + lane / 16 : lane / 8 % 2;
  float acc[kFragsM][kFragsN][4] = {};
  RawCodes next, after;
  if constexpr (kWholeRows) next = load(0), after = load(1);
  UNROLL for (int step = 0; step < 2; ++step) {
    fetch(step, step);
    cp_async_commit();
  }
  if constexpr (kWholeRows) {
    decode(0, next);
    next = after, after = load(2);
  } else {
    decode_slowly(0);
  }
  int place = 0;  // of this step in the ring
  NO_UNROLL for (int step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    __syncthreads();  // this step has arrived and is decoded, and all have multiplied the one before it
    fetch(step + 2, place == 0 ? 2 : place - 1);
    cp_async_commit();
    if (step + 1 < steps) {
      if constexpr (kWholeRows) {
        decode(step + 1, next);
        next = after, after = load(step + 3);
      } else {
        decode_slowly(step + 1);
      }
    }
    const unsigned char *x_tile = shared + place * Tile::kBytesOfX, *w_tile = decoded + step % 2 * Tile::kBytesOfW;
    UNROLL for (int part = 0; part < kStepK / 16; ++part) {
      uint32_t b[kFragsN / 2][4];
      UNROLL for (int j = 0; j < kFragsN / 2; ++j) {
        if constexpr (kTransposed)
          ldmatrix_x4_transposed(b[j], w_tile + place_of<kWRow>(w_row0 + part * 16, w_piece + j * 2));
        else
          ldmatrix_x4(b[j], w_tile + place_of<kWRow>(w_row0 + j * 16, part * 2 + w_piece));
      }
      UNROLL for (int i = 0; i < kFragsM; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, x_tile + place_of<kXRow>(x_row0 + i * 16, part * 2 + x_piece));
        UNROLL for (int j = 0; j < kFragsN; ++j) {
          const uint32_t of_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_16bit<T>(acc[i][j], a, of_b);
        }
      }
    }
    place = place == 2 ? 0 : place + 1;
  }
  cp_async_wait<0>();

  // ---- sums of a part to the workspace; or bias and the output's dtype. Eight neighbouring columns of a row.
  const auto each_run = [&](const auto& to_run) {
    UNROLL for (int group = 0; group < kFragsN / 4; ++group) {
      const int64_t column = n0 + warp_n * kFragsN * 8 + lane % 4 * 8 + group * 32;
      if (column >= plan.outer) continue;
      UNROLL for (int i = 0; i < kFragsM; ++i) UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t row = m0 + warp_m * kFragsM * 16 + lane / 4 + i * 16 + half * 8;
        if (row < p.m) to_run(row, column, [&](int e) { return acc[i][group * 4 + e / 2][half * 2 + e % 2]; });
      }
    }
  };
  const auto write = [&](auto* to, int64_t column, const auto& pack, bool packs) {
    constexpr int kWidth = kVectorWidth<std::decay_t<decltype(*to)>>;
    if (packs) {
      UNROLL for (int part = 0; part < 8 / kWidth; ++part) {
        Pack<std::decay_t<decltype(*to)>, kWidth> piece;
        UNROLL for (int e = 0; e < kWidth; ++e) piece.at[e] = pack[part * kWidth + e];
        store_pack(to, part, piece);
      }
    } else {
      UNROLL for (int e = 0; e < 8; ++e) {
        if (column + e < plan.outer) to[e] = pack[e];
      }
    }
  };
  if (plan.splits > 1) {
    float* sums = static_cast<float*>(p.workspace) + split * p.m * plan.outer;
    const bool packs = plan.outer % 8 == 0;
    each_run([&](int64_t row, int64_t column, const auto& sum) {
      float pack[8];
      UNROLL for (int e = 0; e < 8; ++e) pack[e] = sum(e);
      write(sums + row * plan.outer + column, column, pack, packs);
    });
    return;
  }
  T* out = static_cast<T*>(p.out);
  const bool packs = plan.outer % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  each_run([&](int64_t row, int64_t column, const auto& sum) {
    T pack[8];
    UNROLL for (int e = 0; e < 8; ++e) {
      const bool biased = p.bias != nullptr && column + e < plan.outer;
      pack[e] = from_float<T>(biased ? sum(e) + load_float(p.bias, p.bias_dtype, column + e) : sum(e));
    }
    write(out + row * plan.outer + column, column, pack, packs);
  });
}

template <class T, class Tile, bool kTransposed, bool kWholeRows>
void launch_tiles(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  auto kernel = nf4_tile_kernel<T, Tile, kTransposed, kWholeRows>;
  const auto blocks = static_cast<unsigned>(plan.tiles * plan.splits);
  LAUNCH(kernel, dim3(blocks), dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, code_book(p.w.type), plan);
}

template <class T, bool kTransposed>
void choose_tile(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  if (!plan.whole_rows) return launch_tiles<T, Nf4SmallTile, kTransposed, false>(p, plan, stream);
  if (plan.tile_m == Nf4LargeTile::kM) return launch_tiles<T, Nf4LargeTile, kTransposed, true>(p, plan, stream);
  if (plan.tile_m == Nf4SmallTile::kM) return launch_tiles<T, Nf4SmallTile, kTransposed, true>(p, plan, stream);
  if constexpr (kTransposed) launch_tiles<T, Nf4SkinnyTile, kTransposed, true>(p, plan, stream);
}

void nf4_tiles(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2)
      plan.transposed ? choose_tile<T, true>(p, plan, stream) : choose_tile<T, false>(p, plan, stream);
  });
}

}  // namespace octavo::GPU_NS
