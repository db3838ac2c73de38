#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "common/numeric.h"
#include "sparse/sparse.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#define OCTAVO_ISA_AVX2
#include "cpu/vec_avx512.h"

namespace octavo::cpu {
namespace {

// rows[i][j] becomes rows[j][i]: within quarters of 4 x 4, then the quarters.
inline void transpose(__m512 (&rows)[16]) {
  __m512 quads[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(rows[i], rows[i + 1]), b = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
    quads[i] = _mm512_shuffle_ps(a, c, 0x44);
    quads[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    quads[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    quads[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

}  // namespace
}  // namespace octavo::cpu

#include "sparse/sparse_loops.h"

namespace octavo::cpu::avx512 {
constexpr SparseLoops sparse_loops = CsrLoops<Vec>::table;
}  // namespace octavo::cpu::avx512
#endif
