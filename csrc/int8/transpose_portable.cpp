#include "common/random.h"
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "int8/transpose_loops.h"

namespace octavo::cpu::portable {
const TransposeLoops transpose_loops = TransposeTile<Vec>::table;
}  // namespace octavo::cpu::portable
