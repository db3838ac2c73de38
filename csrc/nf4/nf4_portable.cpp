#include <new>
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "nf4/nf4_loops.h"

namespace octavo::cpu::portable {
const Nf4Loops nf4_loops = Nf4<Vec>::table;
}  // namespace octavo::cpu::portable
