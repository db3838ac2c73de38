#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "common/numeric.h"
#include "common/random.h"
#include "int8/transpose.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#define OCTAVO_SSE_BYTES
#include "cpu/vec_avx2.h"
#include "int8/transpose_loops.h"

namespace octavo::cpu::avx2 {
constexpr TransposeLoops transpose_loops = TransposeTile<Vec>::table;
}  // namespace octavo::cpu::avx2
#endif
