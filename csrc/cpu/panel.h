#pragma once
// Products with a weight that is dequantized a panel at a time, in fp32 over a vector type V (cpu/vec_*.h). A panel's
// tile has 16 outputs (lanes) and some steps j of the sum: panel[j][16]. Rows of x come in blocks, side by side:
// x[j][kRows]. ISA files only, after the target pragma.
#include <cstdint>

namespace octavo::cpu {
namespace {

constexpr int64_t kPanelLanes = 16;

template <class V>
struct FloatPanel {
  static constexpr int kRows = V::kWidth == 16 ? 12 : V::kWidth == 8 ? 4 : 1;  // of x at a time: what registers hold
  static constexpr int kTogether = V::kWidth == 16 ? 2 : 1;                    // tiles multiplied at once

  // sums[i][lane of kTiles tiles] += x[j][i] * panel, over count steps j; the panels of tiles lie panel_size apart.
  template <int kCount, int kTiles>
  static void multiply_rows(const float* x, const float* panel, int64_t panel_size, int64_t count, float* sums,
                            int64_t stride) {
    constexpr int kAcross = kTiles * kPanelLanes / V::kWidth, kEach = kPanelLanes / V::kWidth;
    typename V::F acc[kCount][kAcross];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kAcross; ++v) acc[i][v] = V::load(sums + i * stride + v * V::kWidth);
    for (int64_t j = 0; j < count; ++j) {
      typename V::F b[kAcross];
#pragma GCC unroll 16
      for (int v = 0; v < kAcross; ++v)
        b[v] = V::load(panel + v / kEach * panel_size + j * kPanelLanes + v % kEach * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const typename V::F a = V::set(x[j * kRows + i]);
#pragma GCC unroll 16
        for (int v = 0; v < kAcross; ++v) acc[i][v] = V::fma(a, b[v], acc[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kAcross; ++v) V::store(sums + i * stride + v * V::kWidth, acc[i][v]);
  }

  template <int kTiles>
  static void multiply(const float* x, int64_t rows, const float* panel, int64_t panel_size, int64_t count, float* sums,
                       int64_t stride) {
    if (rows * 3 > kRows * 2)
      multiply_rows<kRows, kTiles>(x, panel, panel_size, count, sums, stride);
    else if (rows * 3 > kRows)
      multiply_rows<(kRows * 2 + 2) / 3, kTiles>(x, panel, panel_size, count, sums, stride);
    else
      multiply_rows<(kRows + 2) / 3, kTiles>(x, panel, panel_size, count, sums, stride);
  }

  // One block of x, of which `rows` rows are needed, times all tiles of a panel.
  static void multiply_tiles(const float* x, int64_t rows, const float* panel, int64_t panel_size, int64_t tiles,
                             int64_t count, float* sums, int64_t stride) {
    int64_t t = 0;
    for (; t + kTogether <= tiles; t += kTogether)
      multiply<kTogether>(x, rows, panel + t * panel_size, panel_size, count, sums + t * kPanelLanes, stride);
    for (; t < tiles; ++t)
      multiply<1>(x, rows, panel + t * panel_size, panel_size, count, sums + t * kPanelLanes, stride);
  }
};

}  // namespace
}  // namespace octavo::cpu
