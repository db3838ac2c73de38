#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "common/numeric.h"
#include "int8/gemm.h"
#pragma GCC target("avx2,fma,f16c")  // last include of shared code above; never popped
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx2.h"
#include "int8/gemm_tile.h"

namespace octavo::cpu::avx2 {
namespace {

// 16 codes as 16-bit words: vpmaddwd then adds exact products in pairs. The u8 x s8 vpmaddubsw would saturate.
[[gnu::always_inline]] inline __m256i words(const int8_t* p, int64_t n = 16) {
  if (n == 16) return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  alignas(16) int8_t part[16] = {};
  __builtin_memcpy(part, p, n);
  return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
}

// The sums of four accumulators' lanes.
__m128i reduce(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i quads = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
}

// Inlined and unrolled by force: the accumulators are in registers only if every index is a constant.
template <int kRows>
[[gnu::always_inline]] inline void step(__m256i (&sum)[kRows][4], const int8_t* a, int64_t a_stride,
                                        const int8_t* const* b, int64_t l, int64_t n) {
  __m256i bv[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) bv[j] = words(b[j] + l, n);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const __m256i av = words(a + i * a_stride + l, n);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(av, bv[j]));
  }
}

// What a kernel brings into L2 while it multiplies: from, from + advance, ... a step each. The hardware's prefetcher
// stops at the end of each page, and a row of 4096 codes is just one.
struct Ahead {
  const int8_t* from;
  int64_t advance;
};
constexpr int64_t kAheadBytes = 16384;  // prefetched at least that far ahead: a few hundred ns at full bandwidth

// kRows x 4 outputs: at kRows = 2, 8 accumulators + 4 b + 2 a fill the 16 registers.
template <int kRows>
void kernel(const int8_t* a, int64_t a_stride, const int8_t* const* b, int64_t k, Ahead next, int32_t* acc) {
  __m256i sum[kRows][4];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm256_setzero_si256();
  const int8_t* const rows[4] = {b[0], b[1], b[2], b[3]};
  int64_t l = 0;
  for (; l + 16 <= k; l += 16, next.from += next.advance) {
    _mm_prefetch(next.from, _MM_HINT_T1);
    step<kRows>(sum, a, a_stride, rows, l, 16);
  }
  if (l < k) step<kRows>(sum, a, a_stride, rows, l, k - l);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + i * kTileN), reduce(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// Four rows of b stay in L1 while a passes by; meanwhile what lies behind them comes from memory, spread evenly over
// the steps: 64 bytes for each 16 codes of four rows in one pass, less where there are more passes.
void multiply(const GemmTile& t) {
  const int64_t k = t.p->k, passes = ceil_div(t.rows, 2), advance = 64 / passes;
  const int64_t distance = 4 * k < kAheadBytes ? kAheadBytes : 4 * k;
  for (int64_t j = 0; j < t.cols; j += 4) {
    const int8_t* b[4];  // beyond the edge the last row is repeated; its sums are not used
    for (int64_t q = 0; q < 4; ++q) b[q] = t.p->b + (t.j0 + (j + q < t.cols ? j + q : t.cols - 1)) * k;
    for (int64_t i = 0; i < t.rows; i += 2) {
      const Ahead next{b[0] + distance + i / 2 * (k / 16 * advance), advance};
      (i + 2 <= t.rows ? kernel<2> : kernel<1>)(t.a + (t.i0 + i) * k, k, b, k, next, t.acc + i * kTileN + j);
    }
  }
}

}  // namespace

constexpr GemmLoops gemm_loops = GemmEpilogue<Vec>::with(nullptr, 0, multiply);

}  // namespace octavo::cpu::avx2
#endif
