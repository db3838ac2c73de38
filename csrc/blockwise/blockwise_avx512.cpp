#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "blockwise/blockwise.h"
#include "common/codebook.h"
#include "common/numeric.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "blockwise/blockwise_loops.h"
#include "cpu/vec_avx512.h"

namespace octavo::cpu::avx512 {
constexpr BlockwiseLoops blockwise_loops = BlockLoops<Vec>::table;
}  // namespace octavo::cpu::avx512
#endif
