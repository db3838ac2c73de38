#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "spqr/columns_loops.h"

namespace octavo::cpu::portable {
const ColumnLoops column_loops = TileLoops<Vec>::table;
}  // namespace octavo::cpu::portable
