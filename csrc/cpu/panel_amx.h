#pragma once
// Products with the panels of panel_bf16.h on AMX tiles. After amx.h and vec_avx512.h.
#include "cpu/panel_bf16.h"

namespace octavo::cpu::amx {
namespace {

// x in tiles: [pairs / 16][kRows][16] words, two tiles of it by two of the panel: four products for four loads.
struct AmxPanel {
  static constexpr int64_t kRows = 32;

  // sums[32][2 tiles] += x[32 rows] * panel; pairs are rounded up to whole tiles.
  static void multiply_two(const uint32_t* x, const uint32_t* panel, bool two, int64_t pairs, float* sums) {
    using avx512::kPairsOfTile;
    constexpr int64_t kTileWords = kPairsOfTile * kPanelLanes, kBytes = avx512::kStride * sizeof(float);
    float* below = sums + 16 * avx512::kStride;
    amx_load<0>(sums, kBytes);
    amx_load<1>(below, kBytes);
    if (two) {
      amx_load<2>(sums + kPanelLanes, kBytes);
      amx_load<3>(below + kPanelLanes, kBytes);
    }
    for (int64_t c = 0; c * kPairsOfTile < pairs; ++c) {
      amx_load<4>(x + 2 * c * kTileWords, 64);
      amx_load<5>(x + (2 * c + 1) * kTileWords, 64);
      amx_load<6>(panel + c * kTileWords, 64);
      amx_multiply_bf16<0, 4, 6>();
      amx_multiply_bf16<1, 5, 6>();
      if (two) {
        amx_load<7>(panel + avx512::kPanelWords + c * kTileWords, 64);
        amx_multiply_bf16<2, 4, 7>();
        amx_multiply_bf16<3, 5, 7>();
      }
    }
    amx_store<0>(sums, kBytes);
    amx_store<1>(below, kBytes);
    if (two) {
      amx_store<2>(sums + kPanelLanes, kBytes);
      amx_store<3>(below + kPanelLanes, kBytes);
    }
  }
};

}  // namespace
}  // namespace octavo::cpu::amx
