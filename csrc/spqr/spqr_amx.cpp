#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 3
#include <immintrin.h>

#include <new>

#include "common/numeric.h"
#include "spqr/tile.h"
// Every CPU with AMX tiles has AVX512-BF16 too. amx.h writes its instructions as asm.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define OCTAVO_ISA_LOOPS
#include "cpu/amx.h"
#include "cpu/vec_avx512.h"
#include "spqr/spqr_loops.h"
#include "spqr/vec_spqr_avx512.h"
// After the vector type:
#include "spqr/panel_bf16.h"

namespace octavo::cpu::amx {
namespace {

using avx512::kPanelTiles;
using avx512::kPanelWords;
using avx512::kStride;
using avx512::multiply_panels;
using avx512::Plain;

constexpr int64_t kRows = 32;  // two tiles of x by two of the panel: four products for four loads

// sums[32][2 tiles] += x[32 rows] * panel, over `chunks` chunks.
void multiply_rows(const uint32_t* x, const uint32_t* panel, bool two, int64_t chunks, float* sums) {
  constexpr int64_t kTileWords = kPairs * kTileRows16, kBytes = kStride * sizeof(float);
  float* below = sums + 16 * kStride;
  amx_load<0>(sums, kBytes);
  amx_load<1>(below, kBytes);
  if (two) {
    amx_load<2>(sums + kTileRows16, kBytes);
    amx_load<3>(below + kTileRows16, kBytes);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    amx_load<4>(x + 2 * c * kTileWords, 64);
    amx_load<5>(x + (2 * c + 1) * kTileWords, 64);
    amx_load<6>(panel + c * kTileWords, 64);
    amx_multiply_bf16<0, 4, 6>();
    amx_multiply_bf16<1, 5, 6>();
    if (two) {
      amx_load<7>(panel + kPanelWords + c * kTileWords, 64);
      amx_multiply_bf16<2, 4, 7>();
      amx_multiply_bf16<3, 5, 7>();
    }
  }
  amx_store<0>(sums, kBytes);
  amx_store<1>(below, kBytes);
  if (two) {
    amx_store<2>(sums + kTileRows16, kBytes);
    amx_store<3>(below + kTileRows16, kBytes);
  }
}

void multiply_bf16(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  amx_begin();
  multiply_panels<kRows>(p, in, tile, row, rows,
                         [](auto* x, int64_t, auto* panel, bool two, int64_t pairs, float* sums) {
                           multiply_rows(x, panel, two, ceil_div(pairs, kPairs), sums);
                         });
  amx_end();
}

}  // namespace

constexpr SpqrLoops spqr_loops{.parts_of_half = 0,
                               .parts_of_bfloat16 = 0,
                               .bfloat16_panels = true,
                               .tiled = true,
                               .panel_tiles = kPanelTiles,
                               .panel_rows = kRows,
                               .prepare = Plain::prepare,
                               .stream = nullptr,
                               .multiply = multiply_bf16,
                               .dequantize = nullptr};

}  // namespace octavo::cpu::amx
#endif
