#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include <new>

#include "common/numeric.h"
#include "spqr/tile.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
#include "spqr/spqr_loops.h"
#include "spqr/vec_spqr_avx512.h"

namespace octavo::cpu::avx512 {
constexpr SpqrLoops spqr_loops = Spqr<SpqrVec>::table;
}  // namespace octavo::cpu::avx512
#endif
