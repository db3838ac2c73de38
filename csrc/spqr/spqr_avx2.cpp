#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include <new>

#include "common/numeric.h"
#include "spqr/tile.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx2.h"
#include "spqr/spqr_loops.h"
#include "spqr/vec_spqr_avx2.h"

namespace octavo::cpu::avx2 {
constexpr SpqrLoops spqr_loops = Spqr<SpqrVec>::table;
}  // namespace octavo::cpu::avx2
#endif
