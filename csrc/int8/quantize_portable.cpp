#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "int8/quantize_loops.h"

namespace octavo::cpu::portable {
const QuantizeLoops quantize_loops = Loops<Vec>::table;
}  // namespace octavo::cpu::portable
