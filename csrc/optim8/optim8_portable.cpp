#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "optim8/optim8_loops.h"

namespace octavo::cpu::portable {
const OptimLoops optim_loops = StepLoops<Vec>::table;
}  // namespace octavo::cpu::portable
