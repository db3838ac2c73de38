#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include <new>

#include "nf4/nf4.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx2.h"
#include "nf4/nf4_loops.h"

namespace octavo::cpu::avx2 {
constexpr Nf4Loops nf4_loops = Nf4<Vec>::table;
}  // namespace octavo::cpu::avx2
#endif
