#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include <new>

#include "common/numeric.h"
#include "spqr/tile.h"
// For CPUs that have AVX512-BF16, which the level does not promise: spqr_cpu.cpp asks.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
#include "spqr/spqr_loops.h"
#include "spqr/vec_spqr_avx512.h"
// After the vector type:
#include "spqr/panel_bf16.h"

namespace octavo::cpu::avx512 {
namespace {

__attribute__((always_inline)) inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// The two columns of a pair of x, for all lanes.
__attribute__((always_inline)) inline __m512i pair_of(const uint32_t* x) {
  return _mm512_set1_epi32(static_cast<int>(*x));
}

// ---- few rows of x: codes become bf16 by a permutation, exactly, and meet bf16 pairs of x ----

// bf16 of the code in the low bits of each 16-bit index; what is above them does not matter.
template <int kBits>
__m512i code_table() {
  alignas(64) uint16_t table[32];
  for (uint32_t i = 0; i < 32; ++i) table[i] = float_bits(static_cast<float>(i & ((1u << kBits) - 1))) >> 16;
  return _mm512_load_si512(table);
}

template <int kBits, int kPair>
__attribute__((always_inline)) inline __m512i pair_index(const __m512i (&planes)[kBits]) {
  if constexpr (spqr_pair_is_split(kBits, kPair)) {
    const __m512i third = _mm512_srli_epi32(planes[2], 13), second = _mm512_srli_epi32(planes[1], 14);
    const __m512i upper = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00040004), third, second, 0xca);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00060006), upper, _mm512_srli_epi16(planes[0], 15), 0xca);
  } else {
    constexpr PairPlace place = spqr_pair_place(kBits, kPair);
    return _mm512_srli_epi16(planes[place.plane], place.shift);
  }
}

template <int kBits, int kPair, int kEnd, class Each>
__attribute__((always_inline)) inline void each_pair(const __m512i (&planes)[kBits], const Each& each) {
  each(kPair, pair_index<kBits, kPair>(planes));
  if constexpr (kPair + 1 < kEnd) each_pair<kBits, kPair + 1, kEnd>(planes, each);
}

template <int kBits, int kBlock, int kCount, int kPlanes>
void stream_rows(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t first, float* sums) {
  const SpqrWeight& w = p.w;
  const int64_t halves = w.k / 16;
  const uint32_t* x = in.parts + first * kPlanes;
  const float* x_sums = in.sums + first;
  const __m512i table = code_table<kBits>();
  // One row of x makes one chain of dependent products: two take turns.
  constexpr int kChains = kCount * kPlanes < 4 ? 2 : 1;
  // Sixteen rows of x: the sums over groups stay in memory, which is what registers do not suffice for.
  __m512 dot[kCount][kChains];
  float* const acc = sums + first * kTileRows16;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    _mm512_store_ps(acc + i * kTileRows16, _mm512_setzero_ps());
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) dot[i][c] = _mm512_setzero_ps();
  }
  const uint32_t* words = spqr_codes(w, tile, 0);
  int64_t group = 0;
  int left = w.group_size;
  for (int64_t half = 0; half < halves; half += 2, words += kBits * kTileRows16) {
    const uint32_t* pairs = x + half * (8 * kBlock * kPlanes);
    __m512i planes[kBits];
#pragma GCC unroll 4
    for (int plane = 0; plane < kBits; ++plane) {
      planes[plane] = _mm512_loadu_si512(words + plane * kTileRows16);
      _mm_prefetch(reinterpret_cast<const char*>(words + plane * kTileRows16) + 4096, _MM_HINT_T0);
    }
    const auto each = [&](int e, __m512i index) __attribute__((always_inline)) {
      const __m512i codes = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
        for (int part = 0; part < kPlanes; ++part)
          dot[i][e % kChains] =
              dot_pairs(dot[i][e % kChains], codes, pair_of(pairs + (e * kBlock + i) * kPlanes + part));
    };
    const auto finish_half = [&]() __attribute__((always_inline)) {
      left -= 16;
      if (left > 0) return;
      left = w.group_size;
      const Plain::Statistics s = Plain::statistics(w, tile, group, 0);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        __m512 sum = dot[i][0];
        if (kChains == 2) sum = _mm512_add_ps(sum, dot[i][kChains - 1]);
        sum = _mm512_fnmadd_ps(s.zero.v[0], _mm512_set1_ps(x_sums[i]), sum);
        float* to = acc + i * kTileRows16;
        _mm512_store_ps(to, _mm512_fmadd_ps(s.scale.v[0], sum, _mm512_load_ps(to)));
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) dot[i][c] = _mm512_setzero_ps();
      }
      x_sums += kBlock;
      ++group;
    };
    each_pair<kBits, 0, 8>(planes, each);
    finish_half();
    if (half + 1 < halves) {
      each_pair<kBits, 8, 16>(planes, each);
      finish_half();
    }
  }
}

template <int kBits, int kPlanes>
void stream_planes(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
  switch (in.block) {
    case 1: return stream_rows<kBits, 1, 1, kPlanes>(p, in, tile, 0, sums);
    case 2: return stream_rows<kBits, 2, 2, kPlanes>(p, in, tile, 0, sums);
    case 4: return stream_rows<kBits, 4, 4, kPlanes>(p, in, tile, 0, sums);
    case 8: return stream_rows<kBits, 8, 8, kPlanes>(p, in, tile, 0, sums);
    default: return stream_rows<kBits, 16, 16, kPlanes>(p, in, tile, 0, sums);
  }
}

template <int kBits>
void stream_tile(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
  if (in.planes == 0)
    Plain::stream_tile<kBits>(p, in, tile, sums);
  else if (in.planes == 1)
    stream_planes<kBits, 1>(p, in, tile, sums);
  else
    stream_planes<kBits, 2>(p, in, tile, sums);
}

// ---- many rows of bf16 x ----

constexpr int kRows = 12;

template <int kCount, int kTiles>
void multiply_rows(const uint32_t* x, const uint32_t* panel, int64_t pairs, float* sums) {
  __m512 acc[kCount][kTiles];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) acc[i][t] = _mm512_load_ps(sums + i * kStride + t * kTileRows16);
  for (int64_t e = 0; e < pairs; ++e) {
    __m512i b[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) b[t] = _mm512_load_si512(panel + t * kPanelWords + e * kTileRows16);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const __m512i a = pair_of(x + e * kRows + i);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) acc[i][t] = dot_pairs(acc[i][t], b[t], a);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) _mm512_store_ps(sums + i * kStride + t * kTileRows16, acc[i][t]);
}

template <int kTiles>
void multiply_panel(const uint32_t* x, int64_t rows, const uint32_t* panel, int64_t pairs, float* sums) {
  (rows > 8   ? multiply_rows<12, kTiles>
   : rows > 4 ? multiply_rows<8, kTiles>
              : multiply_rows<4, kTiles>)(x, panel, pairs, sums);
}

void multiply_bf16(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  const SpqrWeight& w = p.w;
  PanelScratch& s = *static_cast<PanelScratch*>(::operator new(sizeof(PanelScratch), std::align_val_t(64)));
  const int64_t left = spqr_row_tiles(w) - tile, tiles = left < kPanelTiles ? left : kPanelTiles;
  __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kStride * sizeof(float));
  for (int64_t t = 0; t < tiles; ++t) Plain::first_outliers(w, tile + t, s.next[t]);
  for (int64_t column = 0; column < w.k; column += kPanelColumns) {
    const int64_t count = w.k - column < kPanelColumns ? w.k - column : kPanelColumns;
    fill_panels(w, tile, tiles, column, count, s);
    // A block of rows of x, in L1, passes all tiles of the panel before the next one.
    for (int64_t i = 0; i < rows; i += kRows) {
      const uint32_t* x = in.parts + ((row + i) / kRows * in.columns + column) / 2 * kRows;
      float* sums = s.sums + i * kStride;
      int64_t t = 0;
      for (; t + 2 <= tiles; t += 2)
        multiply_panel<2>(x, rows - i, s.panel + t * kPanelWords, count / 2, sums + t * kTileRows16);
      for (; t < tiles; ++t)
        multiply_panel<1>(x, rows - i, s.panel + t * kPanelWords, count / 2, sums + t * kTileRows16);
    }
  }
  Plain::write_all(p, s.sums, kStride, tile, tiles, row, rows);
  ::operator delete(&s, std::align_val_t(64));
}

void multiply(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  if (in.parts) return multiply_bf16(p, in, tile, row, rows);
  for (int64_t t = tile; t < tile + kPanelTiles && t < spqr_row_tiles(p.w); t += Plain::kPanelTiles)
    Plain::multiply(p, in, t, row, rows);
}

}  // namespace

constexpr SpqrLoops spqr_bf16_loops{.parts_of_half = 2,
                                    .parts_of_bfloat16 = 1,
                                    .bfloat16_panels = true,
                                    .tiled = false,
                                    .panel_tiles = kPanelTiles,
                                    .panel_rows = kRows,
                                    .prepare = Plain::prepare,
                                    .stream = Plain::stream_by<stream_tile<2>, stream_tile<3>, stream_tile<4>>,
                                    .multiply = multiply,
                                    .dequantize = Plain::dequantize};
static_assert(kRows == Plain::kRows);  // one form of x for both kinds of panels

}  // namespace octavo::cpu::avx512
#endif
