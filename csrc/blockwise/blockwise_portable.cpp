#define OCTAVO_ISA_LOOPS
#include "blockwise/blockwise_loops.h"
#include "cpu/vec_portable.h"

namespace octavo::cpu::portable {
const BlockwiseLoops blockwise_loops = BlockLoops<Vec>::table;
}  // namespace octavo::cpu::portable
