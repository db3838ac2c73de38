#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "common/numeric.h"
#include "common/random.h"
#include "int8/transpose.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#define OCTAVO_SSE_BYTES
#include "cpu/vec_avx512.h"
#include "int8/transpose_loops.h"

namespace octavo::cpu::avx512 {
constexpr TransposeLoops transpose_loops = TransposeTile<Vec>::table;
}  // namespace octavo::cpu::avx512
#endif
