#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "common/numeric.h"
#include "spqr/columns.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx2.h"
#include "spqr/columns_loops.h"

namespace octavo::cpu::avx2 {
constexpr ColumnLoops column_loops = TileLoops<Vec>::table;
}  // namespace octavo::cpu::avx2
#endif
