#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "blockwise/blockwise.h"
#include "common/codebook.h"
#include "common/numeric.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "blockwise/blockwise_loops.h"
#include "cpu/vec_avx2.h"

namespace octavo::cpu::avx2 {
constexpr BlockwiseLoops blockwise_loops = BlockLoops<Vec>::table;
}  // namespace octavo::cpu::avx2
#endif
