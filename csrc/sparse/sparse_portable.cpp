#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"

namespace octavo::cpu {
namespace {
inline void transpose(float (&)[1]) {}
}  // namespace
}  // namespace octavo::cpu

#include "sparse/sparse_loops.h"

namespace octavo::cpu::portable {
const SparseLoops sparse_loops = CsrLoops<Vec>::table;
}  // namespace octavo::cpu::portable
