#pragma once
// What spqr_cpu.cpp asks of an ISA level, and the loops in fp32 over a vector type V (cpu/vec_*.h). Serial over tiles.
#include "spqr/tile.h"

namespace octavo::cpu {

// x as the loops read it: columns in the weight's order, padded with zeros to whole chunks; rows in blocks, those of a
// block side by side, so that a kernel has them at constant distances.
struct SpqrInput {
  int64_t columns;  // ceil(k / 32) * 32
  int64_t block;    // rows of a block. Streaming: one block, m or the next power of two
  int64_t rows;     // a multiple of block; those beyond m are zeros
  float* x;         // [rows / block, columns, block], or null
  uint32_t* parts;  // [rows / block, columns / 2, block, planes]: pairs of bf16 numbers whose sum is x, or null;
                    // with tiled, which has one plane: [rows / block, columns / 32, block, 16]
  bool tiled;
  int planes;   // 1 or 2; 0 without parts
  float* sums;  // streaming: [groups, block], sums of x over the groups
};

struct SpqrLoops {
  int parts_of_half, parts_of_bfloat16;  // planes that streaming wants for this dtype; 0: fp32
  bool bfloat16_panels;                  // whether products of many rows of bf16 x read parts, not x
  bool tiled;                            // and these in tiles
  int64_t panel_tiles, panel_rows;       // row tiles that a task of such a product takes; its blocks of x
  void (*prepare)(const SpqrMatmul&, const SpqrInput&, int64_t begin, int64_t end);  // blocks of x
  void (*stream)(const SpqrMatmul&, const SpqrInput&, int64_t begin, int64_t end);   // row tiles
  void (*multiply)(const SpqrMatmul&, const SpqrInput&, int64_t tile, int64_t row,
                   int64_t rows);                                         // panel_tiles, x rows
  void (*dequantize)(const SpqrDequantize&, int64_t begin, int64_t end);  // row tiles
};

constexpr int64_t kSpqrRowBlock = 384;  // rows of x a task, whole blocks: its sums, 384 x 128 floats, stay in L2

namespace portable {
extern const SpqrLoops spqr_loops;
}
namespace avx2 {
extern const SpqrLoops spqr_loops;
}
namespace avx512 {
extern const SpqrLoops spqr_loops;
extern const SpqrLoops spqr_bf16_loops;  // with AVX512-BF16
}  // namespace avx512
namespace amx {
extern const SpqrLoops spqr_loops;  // many rows of bf16 x only
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS
#include "cpu/panel.h"
#include "spqr/spqr_lanes.h"

namespace octavo::cpu {
namespace {

template <class V>
struct Spqr : SpqrLanes<V> {
  using Lanes = SpqrLanes<V>;
  using Lanes::fma, Lanes::kLanes, Lanes::mul, Lanes::set, Lanes::statistics, Lanes::store, Lanes::sub;
  using typename Lanes::F;
  using typename Lanes::Statistics;
  // Rows of x at a time in streaming, what fits the registers; and in products of many rows.
  static constexpr int kStreamRows = V::kWidth == 16 ? 8 : V::kWidth == 8 ? 4 : 1;
  static constexpr int kRows = FloatPanel<V>::kRows;  // a divisor of kSpqrRowBlock
  static constexpr int64_t kTileSums = kSpqrStreamRows * kTileRows16;
  static constexpr int64_t kPanelTiles = 4, kPanelColumns = 256;

  // ---- x ----

  static void prepare(const SpqrMatmul& p, const SpqrInput& in, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t block = begin; block < end; ++block)
        for (int64_t i = 0; i < in.block; ++i) prepare_row(p, in, block, i, static_cast<const T*>(p.x));
    });
  }

  template <class T>
  static void prepare_row(const SpqrMatmul& p, const SpqrInput& in, int64_t block, int64_t i, const T* x) {
    const SpqrWeight& w = p.w;
    const int64_t row = block * in.block + i;
    constexpr int64_t kSome = 512;  // columns at a time
    alignas(64) float some[kSome];
    alignas(64) BFloat16 high[kSome], low[kSome];
    for (int64_t j0 = 0; j0 < in.columns; j0 += kSome) {
      const int64_t count = in.columns - j0 < kSome ? in.columns - j0 : kSome;
      const int64_t inside = row >= p.m ? 0 : w.k - j0 < count ? w.k - j0 : count;
      const T* from = x + row * w.k;
      if (w.perm && !w.wide) {
        const uint16_t* ids = static_cast<const uint16_t*>(w.perm) + j0;
        for (int64_t j = 0; j < inside; ++j) some[j] = V::to_float_one(from[ids[j]]);
      } else {
        for (int64_t j = 0; j < inside; ++j) some[j] = V::to_float_one(from[spqr_source_column(w, j0 + j)]);
      }
      for (int64_t j = inside; j < count; ++j) some[j] = 0.0f;
      if (in.x) {
        float* to = in.x + (block * in.columns + j0) * in.block + i;
        for (int64_t j = 0; j < count; ++j) to[j * in.block] = some[j];
      }
      if (in.parts) {
        uint32_t* to = in.parts + (block * in.columns + j0) / 2 * (in.block * in.planes) + i * in.planes;
        for (int64_t j = 0; j < count; j += V::kWidth) {
          const auto v = V::load(some + j);
          V::store(high + j, v);
          if (in.planes == 2) V::store(low + j, V::sub(v, V::load(high + j)));
        }
        if (in.tiled) {
          to = in.parts + (block * in.columns + j0) / 2 * in.block + i * kPairs;
          for (int64_t j = 0; j < count; j += kChunk)
            __builtin_memcpy(to + j / 2 * in.block, high + j, kChunk * sizeof(BFloat16));
        }
        for (int64_t e = 0; e < count / 2 && !in.tiled; ++e) {
          __builtin_memcpy(to + e * (in.block * in.planes), high + 2 * e, 4);
          if (in.planes == 2) __builtin_memcpy(to + e * (in.block * in.planes) + 1, low + 2 * e, 4);
        }
      }
      if (in.sums)
        for (int64_t j = 0; j < count && j0 + j < w.k; j += w.group_size) {  // 512 is a multiple of every group size
          float sum[8] = {};
          for (int e = 0; e < w.group_size; e += 8)
            for (int l = 0; l < 8; ++l) sum[l] += some[j + e + l];
          in.sums[(j0 + j) / w.group_size * in.block + i] =
              ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
        }
    }
  }

  // ---- few rows of x: the weight passes once ----

  // sums[i][lane ...] = rows first ... first + kCount - 1 of x times the dense part of a tile.
  template <int kBits, int kBlock, int kCount>
  static void stream_rows(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t first, float* sums) {
    const SpqrWeight& w = p.w;
    const int64_t halves = w.k / 16;
    for (int lane = 0; lane < kTileRows16; lane += kLanes) {
      F acc[kCount], dot[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) acc[i] = dot[i] = set(0.0f);
      const uint32_t* words = spqr_codes(w, tile, 0);
      const float* x_sums = in.sums + first;
      int64_t group = 0;
      int left = w.group_size;
      const auto finish_half = [&]() __attribute__((always_inline)) {
        left -= 16;
        if (left > 0) return;
        left = w.group_size;
        const Statistics s = statistics(w, tile, group, lane);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          acc[i] = fma(s.scale, fma(s.zero, set(-x_sums[i]), dot[i]), acc[i]);
          dot[i] = set(0.0f);
        }
        x_sums += kBlock;
        ++group;
      };
      for (int64_t half = 0; half < halves; half += 2, words += kBits * kTileRows16) {
        const float* x = in.x + half * 16 * kBlock + first;
        const auto each = [&](int e, const F& even, const F& odd) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int i = 0; i < kCount; ++i) {
            dot[i] = fma(even, set(x[2 * e * kBlock + i]), dot[i]);
            dot[i] = fma(odd, set(x[(2 * e + 1) * kBlock + i]), dot[i]);
          }
        };
        Lanes::template decode_half<kBits, 0>(words, lane, each);
        finish_half();
        if (half + 1 < halves) {
          Lanes::template decode_half<kBits, 1>(words, lane, each);
          finish_half();
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) store(sums + (first + i) * kTileRows16 + lane, acc[i]);
    }
  }

  template <int kBits, int kBlock>
  static void stream_block(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
    constexpr int kCount = kBlock < kStreamRows ? kBlock : kStreamRows;
    for (int64_t i = 0; i < p.m; i += kCount) stream_rows<kBits, kBlock, kCount>(p, in, tile, i, sums);
  }
  template <int kBits>
  static void stream_tile(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
    switch (in.block) {
      case 1: return stream_block<kBits, 1>(p, in, tile, sums);
      case 2: return stream_block<kBits, 2>(p, in, tile, sums);
      case 4: return stream_block<kBits, 4>(p, in, tile, sums);
      case 8: return stream_block<kBits, 8>(p, in, tile, sums);
      default: return stream_block<kBits, 16>(p, in, tile, sums);
    }
  }

  // The outliers of one row times up to 16 rows of x: sums[i * 16].
  static void add_outliers(const SpqrMatmul& p, const SpqrInput& in, int64_t row, float* sums) {
    const SpqrWeight& w = p.w;
    const int64_t begin = w.row_offsets[row], end = w.row_offsets[row + 1];
    if (begin == end) return;
    if (in.block == 1) {
      sums[0] += w.wide ? wide_dot(w, in.x, begin, end) : V::sparse_dot(w.outliers + begin, end - begin, in.x);
      return;
    }
    constexpr int kAll = kSpqrStreamRows / V::kWidth;
    const int vectors = static_cast<int>(ceil_div(in.block, V::kWidth));
    const int lanes = static_cast<int>(in.block < V::kWidth ? in.block : V::kWidth);
    typename V::F acc[kAll];
    for (int v = 0; v < kAll; ++v) acc[v] = V::set(0.0f);
    constexpr int64_t kSome = 64;
    float values[kSome];
    for (int64_t e0 = begin; e0 < end; e0 += kSome) {
      const int64_t count = end - e0 < kSome ? end - e0 : kSome;
      if (w.wide)
        for (int64_t e = 0; e < count; ++e) values[e] = spqr_outlier(w, e0 + e).value;
      else
        V::high_halves_to_floats(w.outliers + e0, count, values);
      for (int64_t e = 0; e < count; ++e) {
        const int64_t column = w.wide ? w.outliers[2 * (e0 + e)] : w.outliers[e0 + e] & 0xffffu;
        const typename V::F value = V::set(values[e]);
        for (int v = 0; v < vectors; ++v)
          acc[v] = V::fma(value, V::load(in.x + column * in.block + v * V::kWidth, lanes), acc[v]);
      }
    }
    float of_row[kSpqrStreamRows];
    for (int v = 0; v < kAll; ++v) V::store(of_row + v * V::kWidth, acc[v]);
    for (int64_t i = 0; i < p.m; ++i) sums[i * kTileRows16] += of_row[i];
  }
  static float wide_dot(const SpqrWeight& w, const float* x, int64_t begin, int64_t end) {
    float sum = 0.0f;
    for (int64_t e = begin; e < end; ++e) {
      const SpqrOutlier outlier = spqr_outlier(w, e);
      sum = fmaf(outlier.value, x[outlier.column], sum);
    }
    return sum;
  }

  // sums [m, 16] of a tile, times unit, plus bias, to out.
  static void finish(const SpqrMatmul& p, int64_t tile, const float* sums) {
    write_all(p, sums, kTileRows16, tile, 1, 0, p.m);
  }

  static void write(const SpqrMatmul& p, const float* sums, int64_t stride, const float* bias, int64_t row,
                    int64_t rows, int64_t column, int64_t columns) {
    const typename V::F unit = V::set(*p.w.unit);
    dispatch_float(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = 0; i < rows; ++i) {
        T* to = static_cast<T*>(p.out) + (row + i) * p.w.n + column;
        for (int64_t r = 0; r < columns; r += V::kWidth) {
          const int count = static_cast<int>(columns - r < V::kWidth ? columns - r : V::kWidth);
          V::store(to + r, V::fma(V::load(sums + i * stride + r), unit, V::load(bias + r)), count);
        }
      }
    });
  }

  static void stream(const SpqrMatmul& p, const SpqrInput& in, int64_t begin, int64_t end) {
    const SpqrWeight& w = p.w;
    alignas(64) float sums[kTileSums];
    for (int64_t tile = begin; tile < end; ++tile) {
      (w.bits == 2 ? stream_tile<2> : w.bits == 3 ? stream_tile<3> : stream_tile<4>)(p, in, tile, sums);
      if (w.row_offsets)
        for (int64_t r = 0; r < kTileRows16 && tile * kTileRows16 + r < w.n; ++r)
          add_outliers(p, in, tile * kTileRows16 + r, sums + r);
      finish(p, tile, sums);
    }
  }

  // ---- the dense weight, a panel at a time ----

  // panel[j - column][lane] = dense + outliers of 16 rows, columns [column, column + count), a multiple of 16 each.
  template <int kBits>
  static void fill_panel_bits(const SpqrWeight& w, int64_t tile, int64_t column, int64_t count, float* panel) {
    for (int lane = 0; lane < kTileRows16; lane += kLanes)
      for (int64_t half = column / 16; half < (column + count) / 16; ++half) {
        const Statistics s = statistics(w, tile, half * 16 / w.group_size, lane);
        float* to = panel + (half * 16 - column) * kTileRows16 + lane;
        const int first = half % 2 * 8;
        const auto each = [&](int e, const F& even, const F& odd) {
          store(to + (2 * (e - first)) * kTileRows16, mul(sub(even, s.zero), s.scale));
          store(to + (2 * (e - first) + 1) * kTileRows16, mul(sub(odd, s.zero), s.scale));
        };
        const uint32_t* words = spqr_codes(w, tile, half / 2);
        if (half % 2 == 0)
          Lanes::template decode_half<kBits, 0>(words, lane, each);
        else
          Lanes::template decode_half<kBits, 1>(words, lane, each);
      }
  }
  // next[r]: the first outlier of row r not yet in a panel; columns come in ascending order.
  static void fill_panel(const SpqrWeight& w, int64_t tile, int64_t column, int64_t count, int64_t* next,
                         float* panel) {
    (w.bits == 2   ? fill_panel_bits<2>
     : w.bits == 3 ? fill_panel_bits<3>
                   : fill_panel_bits<4>)(w, tile, column, count, panel);
    if (!w.row_offsets) return;
    for (int64_t r = 0; r < kTileRows16 && tile * kTileRows16 + r < w.n; ++r) {
      const int64_t end = w.row_offsets[tile * kTileRows16 + r + 1];
      for (; next[r] < end; ++next[r]) {
        const SpqrOutlier outlier = spqr_outlier(w, next[r]);
        if (outlier.column >= column + count) break;
        panel[(outlier.column - column) * kTileRows16 + r] += outlier.value;
      }
    }
  }
  static void first_outliers(const SpqrWeight& w, int64_t tile, int64_t* next) {
    for (int64_t r = 0; r < kTileRows16; ++r)
      next[r] = w.row_offsets && tile * kTileRows16 + r < w.n ? w.row_offsets[tile * kTileRows16 + r] : 0;
  }

  static void dequantize(const SpqrDequantize& p, int64_t begin, int64_t end) {
    const SpqrWeight& w = p.w;
    constexpr int64_t kColumns = 64;
    alignas(64) float panel[kColumns * kTileRows16];
    int64_t next[kTileRows16];
    const typename V::F unit = V::set(*w.unit);
    for (int64_t tile = begin; tile < end; ++tile) {
      first_outliers(w, tile, next);
      const int64_t rows = w.n - tile * kTileRows16 < kTileRows16 ? w.n - tile * kTileRows16 : kTileRows16;
      for (int64_t column = 0; column < w.k; column += kColumns) {
        const int64_t count = w.k - column < kColumns ? w.k - column : kColumns;
        fill_panel(w, tile, column, count, next, panel);
        for (int64_t at = 0; at < count * kTileRows16; at += V::kWidth)
          V::store(panel + at, V::mul(V::load(panel + at), unit));
        dispatch_float(p.dtype, [&](auto tag) {
          using T = decltype(tag);
          T* out = static_cast<T*>(p.out) + tile * kTileRows16 * w.k;
          for (int64_t j = 0; j < count; ++j) {
            T line[kTileRows16];
            for (int64_t r = 0; r < kTileRows16; r += V::kWidth)
              V::store(line + r, V::load(panel + j * kTileRows16 + r));
            T* to = out + spqr_source_column(w, column + j);
            for (int64_t r = 0; r < rows; ++r) to[r * w.k] = line[r];
          }
        });
      }
    }
  }

  // ---- many rows of x: panels of the dense weight in fp32 ----

  static void multiply(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
    const SpqrWeight& w = p.w;
    constexpr int64_t kStride = kPanelTiles * kTileRows16, kSize = kPanelColumns * kTileRows16;
    struct Scratch {
      alignas(64) float panel[kPanelTiles * kSize];
      alignas(64) float sums[kSpqrRowBlock * kStride];
      int64_t next[kPanelTiles][kTileRows16];
    };
    Scratch& s = *static_cast<Scratch*>(::operator new(sizeof(Scratch), std::align_val_t(64)));
    const int64_t left = spqr_row_tiles(w) - tile, tiles = left < kPanelTiles ? left : kPanelTiles;
    __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kStride * sizeof(float));
    for (int64_t t = 0; t < tiles; ++t) first_outliers(w, tile + t, s.next[t]);
    for (int64_t column = 0; column < w.k; column += kPanelColumns) {
      const int64_t count = w.k - column < kPanelColumns ? w.k - column : kPanelColumns;
      for (int64_t t = 0; t < tiles; ++t) fill_panel(w, tile + t, column, count, s.next[t], s.panel + t * kSize);
      for (int64_t i = 0; i < rows; i += kRows) {
        const float* x = in.x + ((row + i) / kRows * in.columns + column) * kRows;
        float* sums = s.sums + i * kStride;
        const int64_t some = rows - i < kRows ? rows - i : kRows;
        FloatPanel<V>::multiply_tiles(x, some, s.panel, kSize, tiles, count, sums, kStride);
      }
    }
    write_all(p, s.sums, kStride, tile, tiles, row, rows);
    ::operator delete(&s, std::align_val_t(64));
  }

  static void write_all(const SpqrMatmul& p, const float* sums, int64_t stride, int64_t tile, int64_t tiles,
                        int64_t row, int64_t rows) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = (tile + t) * kTileRows16, count = p.w.n - first < kTileRows16 ? p.w.n - first : kTileRows16;
      float bias[kTileRows16] = {};
      if (p.bias)
        for (int64_t r = 0; r < count; ++r) bias[r] = load_float(p.bias, p.bias_dtype, first + r);
      write(p, sums + t * kTileRows16, stride, bias, row, rows, first, count);
    }
  }

  static constexpr SpqrLoops table{.parts_of_half = 0,
                                   .parts_of_bfloat16 = 0,
                                   .bfloat16_panels = false,
                                   .tiled = false,
                                   .panel_tiles = kPanelTiles,
                                   .panel_rows = kRows,
                                   .prepare = prepare,
                                   .stream = stream,
                                   .multiply = multiply,
                                   .dequantize = dequantize};
};

}  // namespace
}  // namespace octavo::cpu
#endif
