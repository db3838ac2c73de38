#pragma once
// Panels (cpu/panel_bf16.h) of a dequantized SpQR weight. After the target pragma of an AVX512-BF16 file.
#include "cpu/panel_bf16.h"
#include "spqr/spqr_loops.h"

namespace octavo::cpu::avx512 {
namespace {

using Plain = Spqr<SpqrVec>;

struct PanelScratch {
  alignas(64) uint32_t panel[kPanelTiles * kPanelWords];
  alignas(64) float sums[kSpqrRowBlock * kStride];
  alignas(64) float scale[kPanelColumns / 16][kTileRows16], zero[kPanelColumns / 16][kTileRows16];
  int64_t next[kPanelTiles][kTileRows16];
};

template <int kBits>
void fill_panel(const SpqrWeight& w, int64_t tile, int64_t column, int64_t count, int64_t* next, PanelScratch& s,
                uint32_t* panel) {
  for (int64_t half = column / 16; half < (column + count) / 16; ++half) {
    const Plain::Statistics of_group = Plain::statistics(w, tile, half * 16 / w.group_size, 0);
    Plain::store(s.scale[half - column / 16], of_group.scale);
    Plain::store(s.zero[half - column / 16], of_group.zero);
    uint32_t* to = panel + (half * 8 - column / 2) * kTileRows16;
    const int first = half % 2 * 8;
    const auto each = [&](int e, const Plain::F& even, const Plain::F& odd) {
      const Plain::F a = Plain::mul(Plain::sub(even, of_group.zero), of_group.scale);
      const Plain::F b = Plain::mul(Plain::sub(odd, of_group.zero), of_group.scale);
      _mm512_store_si512(to + (e - first) * kTileRows16, to_pairs(a.v[0], b.v[0]));
    };
    const uint32_t* words = spqr_codes(w, tile, half / 2);
    if (half % 2 == 0)
      Plain::decode_half<kBits, 0>(words, 0, each);
    else
      Plain::decode_half<kBits, 1>(words, 0, each);
  }
  if (!w.row_offsets) return;
  for (int64_t r = 0; r < kTileRows16 && tile * kTileRows16 + r < w.n; ++r) {
    const int64_t end = w.row_offsets[tile * kTileRows16 + r + 1];
    for (; next[r] < end; ++next[r]) {
      const SpqrOutlier outlier = spqr_outlier(w, next[r]);
      const int64_t j = outlier.column - column;
      if (j >= count) break;
      // The sum is rounded once, so the dense value is computed again.
      const uint32_t* words = spqr_codes(w, tile, outlier.column / kChunk) + r;
      const uint32_t pair = spqr_pair(kBits, words, kTileRows16, static_cast<int>(outlier.column % kChunk / 2));
      const float code = static_cast<float>(pair >> (outlier.column % 2 * 16) & 0xffffu);
      const float dense = (code - s.zero[j / 16][r]) * s.scale[j / 16][r];
      const BFloat16 value = from_float<BFloat16>(dense + outlier.value);
      __builtin_memcpy(reinterpret_cast<uint16_t*>(panel + j / 2 * kTileRows16 + r) + j % 2, &value, sizeof value);
    }
  }
}

// A panel of kPanelTiles tiles and their outliers, columns [column, column + count).
inline __attribute__((always_inline)) void fill_panels(const SpqrWeight& w, int64_t tile, int64_t tiles, int64_t column,
                                                       int64_t count, PanelScratch& s) {
  const auto fill = w.bits == 2 ? fill_panel<2> : w.bits == 3 ? fill_panel<3> : fill_panel<4>;
  for (int64_t t = 0; t < tiles; ++t) fill(w, tile + t, column, count, s.next[t], s, s.panel + t * kPanelWords);
}

// A task of the product: all panels of up to kPanelTiles tiles, one after the other, times blocks of kRows rows of x.
// multiply(x, rows, panel, two, pairs, sums) takes two tiles of the panel, or one.
template <int64_t kRows, class Multiply>
__attribute__((always_inline)) inline void multiply_panels(const SpqrMatmul& p, const SpqrInput& in, int64_t tile,
                                                           int64_t row, int64_t rows, const Multiply& multiply) {
  const SpqrWeight& w = p.w;
  PanelScratch& s = *static_cast<PanelScratch*>(::operator new(sizeof(PanelScratch), std::align_val_t(64)));
  const int64_t left = spqr_row_tiles(w) - tile, tiles = left < kPanelTiles ? left : kPanelTiles;
  __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kStride * sizeof(float));
  for (int64_t t = 0; t < tiles; ++t) Plain::first_outliers(w, tile + t, s.next[t]);
  for (int64_t column = 0; column < w.k; column += kPanelColumns) {
    const int64_t count = w.k - column < kPanelColumns ? w.k - column : kPanelColumns;
    // Half a chunk at the end: x is zero there, but what is left in the panel might not be finite.
    if (count % kChunk)
      for (int64_t t = 0; t < tiles; ++t)
        __builtin_memset(s.panel + t * kPanelWords + count / 2 * kTileRows16, 0, kPairs / 2 * kTileRows16 * 4);
    fill_panels(w, tile, tiles, column, count, s);
    // A block of rows of x, in L1, passes all tiles of the panel before the next one.
    for (int64_t i = 0; i < rows; i += kRows) {
      const uint32_t* x = in.parts + ((row + i) / kRows * in.columns + column) / 2 * kRows;
      for (int64_t t = 0; t < tiles; t += 2)
        multiply(x, rows - i, s.panel + t * kPanelWords, t + 1 < tiles, count / 2,
                 s.sums + i * kStride + t * kTileRows16);
    }
  }
  Plain::write_all(p, s.sums, kStride, tile, tiles, row, rows);
  ::operator delete(&s, std::align_val_t(64));
}

}  // namespace
}  // namespace octavo::cpu::avx512
