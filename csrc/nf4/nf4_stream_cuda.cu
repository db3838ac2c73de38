// Few rows of x: the weight streams through once for 16 rows of x. A block takes 16 rows of the weight, its warps share
// the columns. README.md of this folder explains the plan and counts it.
//
// A lane (g, t) = (lane / 4, lane % 4) of a warp decodes 16 neighbouring codes of rows g and g + 8, straight from
// memory: they are its words of four mma (a product is the same in any order of k), of which the four lanes of a row
// make 64 columns: one block of the weight, or a part of one. The sums of codes times x of these columns start at zero;
// times absmax, in fp32, they join the row's. Codes are values of the code book rounded to x's dtype; fp32 x and its
// code book are three bf16 numbers each, of which the six products that matter are added.
#include <type_traits>

#include "nf4/decode_gpu.h"
#include "nf4/work_gpu.h"

namespace octavo::GPU_NS {

constexpr int kStreamWarps = 4, kStreamRows = 16;
constexpr int kStreamChunk = 64, kStreamChunks = 4, kStreamStep = kStreamChunk * kStreamChunks;  // columns; of a warp

template <class T>
constexpr int kStreamPlanes = std::is_same_v<T, float> ? 3 : 1;

template <class T>
struct StreamBook {
  BytePlanes<2> plane[kStreamPlanes<T>];
};

// Blocks of a multiprocessor, as many as registers without spills allow.
template <class T, int kTiles, bool kShort>
constexpr int kStreamResident = sizeof(T) == 4 || (kTiles == 2 && kShort) ? 2
                                : kTiles == 2                             ? 3
                                                                          : 4;

// kTiles: of 8 rows of x. kShort: blocks of 32 columns.
template <class T, int kTiles, bool kShort>
__global__ void __launch_bounds__(kStreamWarps * 32, kStreamResident<T, kTiles, kShort>)
    nf4_stream_kernel(Nf4Matmul p, StreamBook<T> book_in, int64_t passes) {
  using E = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;
  constexpr int kPlanes = kStreamPlanes<T>, kScales = kShort ? 2 : 1;  // scales: of a row in a chunk
  StreamBook<T> book;
  in_registers(book_in.plane, book.plane);
  const LowBitTensor& w = p.w;
  const int thread = threadIdx.x % (kStreamWarps * 32), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t tile = blockIdx.x / static_cast<unsigned>(passes), pass = blockIdx.x % static_cast<unsigned>(passes);
  // Columns in pieces of 32, the shortest block: their number is an int for any row.
  const int pieces = static_cast<int>(p.k >> 5), log2_pieces = __ffs(static_cast<int>(w.blocksize)) - 6;
  const float offset = offset_of(w);

  // ---- the weight: rows past the edge repeat the last one; what comes of them is not stored
  const uint8_t* codes[2];
  int64_t first_block[2];
  UNROLL for (int half = 0; half < 2; ++half) {
    const int64_t row = tile * kStreamRows + g + half * 8, inside = row < p.n ? row : p.n - 1;
    codes[half] = w.packed + inside * (p.k >> 1) + warp * (kStreamStep / 2) + t * (kShort ? 4 : 8);
    first_block[half] = inside * (pieces >> log2_pieces);
  }
  uint2 words[2][kStreamChunks];
  const auto load_words = [&](int piece, int chunk) {  // piece: where the step begins; so do the pointers
    const int left = pieces - piece - chunk * 2;
    UNROLL for (int half = 0; half < 2; ++half) {
      const uint8_t* from = codes[half] + chunk * (kStreamChunk / 2);
      uint2& to = words[half][chunk];
      to = make_uint2(0, 0);
      if constexpr (kShort) {
        if (left > 0) to.x = __ldcs(reinterpret_cast<const unsigned*>(from));
        if (left > 1) to.y = __ldcs(reinterpret_cast<const unsigned*>(from + 16));
      } else {
        if (left > 0) to = __ldcs(reinterpret_cast<const uint2*>(from));
      }
    }
  };
  // Lane t brings absmax of its row's chunk t.
  RawAbsmax raw[2][kScales];
  const auto load_absmax = [&](int piece) {
    UNROLL for (int s = 0; s < kScales; ++s) {
      const int own = piece + t * 2 + s;
      UNROLL for (int half = 0; half < 2; ++half) {
        raw[half][s] = RawAbsmax{};
        if (own < pieces) raw[half][s].load(w, first_block[half] + (own >> log2_pieces));
      }
    }
  };

  // ---- x: 16 columns of row g of each tile. Rows past the edge repeat the last one, too.
  const E* x_rows[kTiles];
  UNROLL for (int j = 0; j < kTiles; ++j) {
    const int64_t row = pass * (kTiles * 8) + j * 8 + g;
    x_rows[j] = static_cast<const E*>(kPlanes == 1 ? p.x : p.workspace) + (row < p.m ? row : p.m - 1) * p.k +
                warp * kStreamStep + t * (kShort ? 8 : 16);
  }

  float acc[kTiles][4] = {};
  int piece = warp * (kStreamStep / 32);
  UNROLL for (int chunk = 0; chunk < kStreamChunks; ++chunk) load_words(piece, chunk);
  load_absmax(piece);
  // All warps take equally many turns, the last on zeros perhaps: their lanes are together.
  constexpr int kTurn = kStreamWarps * kStreamStep;
  NO_UNROLL for (int first = 0; first < pieces; first += kTurn / 32) {
    float own[2][kScales];
    UNROLL for (int s = 0; s < kScales; ++s) UNROLL for (int half = 0; half < 2; ++half) own[half][s] =
        raw[half][s].decode(w, offset);
    load_absmax(piece + kTurn / 32);
    codes[0] += kTurn / 2, codes[1] += kTurn / 2;
    UNROLL for (int chunk = 0; chunk < kStreamChunks; ++chunk) {
      if constexpr (kPlanes > 1) __syncwarp();  // all x of a step at once would take more registers than there are
      const uint2 now[2] = {words[0][chunk], words[1][chunk]};
      load_words(piece + kTurn / 32, chunk);
      uint4 x[kTiles][kPlanes][2];
      UNROLL for (int j = 0; j < kTiles; ++j) UNROLL for (int part = 0; part < 2; ++part) {
        const bool inside = piece + chunk * 2 + (kShort ? part : 0) < pieces;
        UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
          const E* from = x_rows[j] + plane * (p.m * p.k) + chunk * kStreamChunk + part * (kShort ? 32 : 8);
          x[j][plane][part] = inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        }
      }
      float d[kTiles][4] = {};
      UNROLL for (int word = 0; word < 2; ++word) {
        const Quads quads[2] = {Quads(word == 0 ? now[0].x : now[0].y), Quads(word == 0 ? now[1].x : now[1].y)};
        UNROLL for (int quad = 0; quad < 2; ++quad) {  // an mma each: four codes of both rows
          uint32_t a[kPlanes][4];
          UNROLL for (int half = 0; half < 2; ++half) UNROLL for (int plane = 0; plane < kPlanes; ++plane) quads[half]
              .half[quad]
              .pairs(book.plane[plane], a[plane][half], a[plane][half + 2]);
          UNROLL for (int j = 0; j < kTiles; ++j) {
            UNROLL for (int of_w = kPlanes - 1; of_w >= 0; --of_w) {  // the smallest products first
              UNROLL for (int of_x = kPlanes - 1 - of_w; of_x >= 0; --of_x) {
                const uint4 b = x[j][of_x][word];
                mma_16bit<E>(d[j], a[of_w], {quad == 0 ? b.x : b.z, quad == 0 ? b.y : b.w});
              }
            }
          }
        }
        if (kShort || word == 1) {
          UNROLL for (int half = 0; half < 2; ++half) {
            const float absmax = __shfl_sync(0xffffffffu, own[half][kShort ? word : 0], chunk, 4);
            UNROLL for (int j = 0; j < kTiles; ++j) UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
              acc[j][e] = fmaf(absmax, d[j][e], acc[j][e]);
              d[j][e] = 0.0f;
            }
          }
        }
      }
    }
    UNROLL for (int j = 0; j < kTiles; ++j) x_rows[j] += kTurn;
    piece += kTurn / 32;
  }

  // ---- the warps' sums. Of the eight rows of a tile, t + 4 c is row 2 t + c of x; half of the sixteen columns change
  // places in every other pair: then what a warp stores, and what it reads, covers all banks once.
  SHARED(float, sums, [kStreamWarps][kTiles * 8][kStreamRows]);
  const auto place = [](int of_x, int row) { return row ^ of_x % 4 / 2 * 8; };
  UNROLL for (int j = 0; j < kTiles; ++j) UNROLL for (int e = 0; e < 4; ++e) {
    const int of_x = j * 8 + t + e % 2 * 4;
    sums[warp][of_x][place(of_x, g + e / 2 * 8)] = acc[j][e];
  }
  __syncthreads();
  UNROLL for (int j = 0; j < kTiles; ++j) {
    const int of_x = j * 8 + thread / kStreamRows, row = thread % kStreamRows;
    const int64_t r = pass * (kTiles * 8) + of_x / 8 * 8 + of_x % 4 * 2 + of_x / 4 % 2, i = tile * kStreamRows + row;
    if (r >= p.m || i >= p.n) continue;
    float sum = 0.0f;
    UNROLL for (int from = 0; from < kStreamWarps; ++from) sum += sums[from][of_x][place(of_x, row)];
    if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, i);
    static_cast<T*>(p.out)[r * p.n + i] = from_float<T>(sum);
  }
}

// x in fp32 as three bf16 numbers that add up to it. The first is the nearest but where that would be Inf.
__global__ void __launch_bounds__(256) nf4_split_kernel(const float* x, BFloat16* planes, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float rest = x[i];
  UNROLL for (int plane = 0; plane < 3; ++plane) {
    const bool large = plane == 0 && abs_bits(rest) >= 0x7f7f8000u && abs_bits(rest) < 0x7f800000u;
    const BFloat16 part = large ? BFloat16{static_cast<uint16_t>(float_bits(rest) >> 16)} : from_float<BFloat16>(rest);
    planes[plane * count + i] = part;
    rest -= to_float(part);
  }
}

template <class T>
StreamBook<T> stream_book(QuantType type) {
  using E = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;
  StreamBook<T> book{};
  for (int plane = 0; plane < kStreamPlanes<T>; ++plane)
    book.plane[plane] = byte_planes<2>([&](uint32_t i) {
      if constexpr (kStreamPlanes<T> == 1) return uint32_t{product_value<E>(type, small_book(type), i).bits};
      float rest = small_book(type).value[i];
      for (int before = 0; before < plane; ++before) rest -= to_float(from_float<E>(rest));
      return uint32_t{from_float<E>(rest).bits};
    });
  return book;
}

template <class T, int kTiles>
void launch_stream(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  auto kernel = p.w.blocksize < kStreamChunk ? nf4_stream_kernel<T, kTiles, true> : nf4_stream_kernel<T, kTiles, false>;
  const int64_t passes = ceil_div(p.m, kTiles * 8);
  const auto blocks = static_cast<unsigned>(plan.tiles * passes);
  LAUNCH(kernel, dim3(blocks), dim3(kStreamWarps * 32), 0, stream, p, stream_book<T>(p.w.type), passes);
}

void nf4_stream(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  if (p.dtype == DType::f32) {
    const int64_t count = p.m * p.k;
    const auto blocks = static_cast<unsigned>(ceil_div(count, 256));
    LAUNCH(nf4_split_kernel, dim3(blocks), dim3(256), 0, stream, static_cast<const float*>(p.x),
           static_cast<BFloat16*>(p.workspace), count);
  }
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {  // two tiles of fp32 would not fit into the registers
      if (p.m > 8) return launch_stream<T, 2>(p, plan, stream);
    }
    launch_stream<T, 1>(p, plan, stream);
  });
}

}  // namespace octavo::GPU_NS
