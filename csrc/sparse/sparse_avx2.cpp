#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "common/numeric.h"
#include "sparse/sparse.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#define OCTAVO_ISA_AVX2
#include "cpu/vec_avx2.h"

namespace octavo::cpu {
namespace {

// rows[i][j] becomes rows[j][i].
inline void transpose(__m256 (&rows)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int high = 0; high < 2; ++high) {
      quads[i + 2 * high] = _mm256_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0x44);
      quads[i + 2 * high + 1] = _mm256_shuffle_ps(pairs[i + high], pairs[i + 2 + high], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace octavo::cpu

#include "sparse/sparse_loops.h"

namespace octavo::cpu::avx2 {
constexpr SparseLoops sparse_loops = CsrLoops<Vec>::table;
}  // namespace octavo::cpu::avx2
#endif
