#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 3
#include <immintrin.h>

#include <new>

#include "nf4/nf4.h"
// Every CPU with AMX tiles has AVX512-BF16 too. amx.h writes its instructions as asm.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define OCTAVO_ISA_LOOPS
#include "cpu/amx.h"
#include "cpu/vec_avx512.h"
// After the vector type:
#include "cpu/panel_amx.h"
#include "nf4/nf4_panel_bf16.h"

namespace octavo::cpu::amx {
namespace {

void multiply(const Nf4Matmul& p, const Nf4Input& in, int64_t output, int64_t row, int64_t rows) {
  amx_begin();
  avx512::multiply_panels<AmxPanel::kRows>(p, in, output, row, rows,
                                           [](auto* x, int64_t, auto* panel, bool two, int64_t pairs, float* sums) {
                                             AmxPanel::multiply_two(x, panel, two, pairs, sums);
                                           });
  amx_end();
}

}  // namespace

constexpr Nf4Loops nf4_loops{.parts_streaming = false,
                             .parts_panels = true,
                             .tiled = true,
                             .panel_outputs = avx512::kPanelOutputs,
                             .panel_rows = AmxPanel::kRows,
                             .quantize = nullptr,
                             .dequantize = nullptr,
                             .prepare = avx512::Plain::prepare,
                             .stream = nullptr,
                             .multiply = multiply};

}  // namespace octavo::cpu::amx
#endif
