#pragma once
// Panels of a dequantized weight as pairs of bf16, [pair][16 outputs]: what a vdpbf16ps takes, and at the same time a
// right operand of an AMX tile. After the target pragma of an AVX512-BF16 file and vec_avx512.h.
#include "cpu/panel.h"

namespace octavo::cpu::avx512 {
namespace {

constexpr int64_t kPanelTiles = 8, kPanelColumns = 512;
constexpr int64_t kPanelWords = kPanelColumns / 2 * kPanelLanes, kStride = kPanelTiles * kPanelLanes;
constexpr int64_t kPairsOfTile = 16;  // pairs of an AMX tile

__attribute__((always_inline)) inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Both numbers of a pair of x, for all lanes.
__attribute__((always_inline)) inline __m512i pair_of(const uint32_t* x) {
  return _mm512_set1_epi32(static_cast<int>(*x));
}

// What the outputs have at an even and at the odd step after it, as 16 words.
__attribute__((always_inline)) inline __m512i to_pairs(__m512 even, __m512 odd) {
  const __m512i order = _mm512_add_epi32(_mm512_set1_epi32(0x00100000),
                                         _mm512_mullo_epi32(Vec::lane_ids(), _mm512_set1_epi32(0x00010001)));
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
}

// x: [pairs][FloatPanel<Vec>::kRows] words, so that there is one form of x for both kinds of panels.
struct Bf16Panel {
  static constexpr int kRows = FloatPanel<Vec>::kRows;
  static_assert(kRows == 12);

  template <int kCount, int kTiles>
  static void multiply_rows(const uint32_t* x, const uint32_t* panel, int64_t pairs, float* sums) {
    __m512 acc[kCount][kTiles];
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) acc[i][t] = _mm512_load_ps(sums + i * kStride + t * kPanelLanes);
    for (int64_t e = 0; e < pairs; ++e) {
      __m512i b[kTiles];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) b[t] = _mm512_load_si512(panel + t * kPanelWords + e * kPanelLanes);
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
      for (int t = 0; t < kTiles; ++t) _mm512_store_ps(sums + i * kStride + t * kPanelLanes, acc[i][t]);
  }

  template <int kTiles>
  static void multiply(const uint32_t* x, int64_t rows, const uint32_t* panel, int64_t pairs, float* sums) {
    (rows > 8   ? multiply_rows<12, kTiles>
     : rows > 4 ? multiply_rows<8, kTiles>
                : multiply_rows<4, kTiles>)(x, panel, pairs, sums);
  }

  // One block of x times two tiles of a panel, or one.
  static void multiply_two(const uint32_t* x, int64_t rows, const uint32_t* panel, bool two, int64_t pairs,
                           float* sums) {
    (two ? multiply<2> : multiply<1>)(x, rows, panel, pairs, sums);
  }
};

}  // namespace
}  // namespace octavo::cpu::avx512
