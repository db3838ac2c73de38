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
#include "cpu/panel_amx.h"
#include "spqr/panel_bf16.h"

namespace octavo::cpu::amx {
namespace {

using avx512::kPanelTiles;
using avx512::multiply_panels;
using avx512::Plain;

void multiply_bf16(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  amx_begin();
  multiply_panels<AmxPanel::kRows>(p, in, tile, row, rows,
                                   [](auto* x, int64_t, auto* panel, bool two, int64_t pairs, float* sums) {
                                     AmxPanel::multiply_two(x, panel, two, pairs, sums);
                                   });
  amx_end();
}

}  // namespace

constexpr SpqrLoops spqr_loops{.parts_of_half = 0,
                               .parts_of_bfloat16 = 0,
                               .bfloat16_panels = true,
                               .tiled = true,
                               .panel_tiles = kPanelTiles,
                               .panel_rows = AmxPanel::kRows,
                               .prepare = Plain::prepare,
                               .stream = nullptr,
                               .multiply = multiply_bf16,
                               .dequantize = nullptr};

}  // namespace octavo::cpu::amx
#endif
