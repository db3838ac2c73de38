#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "int8/gemm_tile.h"

namespace octavo::cpu::portable {
namespace {

void multiply(const GemmTile& t) {
  const int64_t k = t.p->k;
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.cols; ++j) {
      const int8_t *a = t.a + (t.i0 + i) * k, *b = t.p->b + (t.j0 + j) * k;
      int32_t sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a[l] * b[l];
      t.acc[i * kTileN + j] = sum;
    }
}

}  // namespace

const GemmLoops gemm_loops = GemmEpilogue<Vec>::with(nullptr, 0, multiply);

}  // namespace octavo::cpu::portable
