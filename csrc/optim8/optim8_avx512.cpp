#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "common/codebook.h"
#include "common/numeric.h"
#include "optim8/optim8.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
#include "optim8/optim8_loops.h"

namespace octavo::cpu::avx512 {
constexpr OptimLoops optim_loops = StepLoops<Vec>::table;
}  // namespace octavo::cpu::avx512
#endif
