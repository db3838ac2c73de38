#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 1
#include <immintrin.h>

#include "cpu/peak.h"
#pragma GCC target("avx2,fma,f16c")  // last include above; never popped

namespace octavo::cpu::avx2 {

// The loops are assembly because a compiler that spills, hoists or merges a step measures something else. Ten
// independent accumulators cover two ports times a latency of five cycles; their values are never read.
#define TEN_TIMES(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9)
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10"
#define MADD(n) "vpmaddwd %0, %1, %%ymm10\n vpaddd %%ymm10, %%ymm" #n ", %%ymm" #n "\n"
#define FMA(n) "vfmadd132ps %0, %1, %%ymm" #n "\n"

double int8_loop(int64_t iterations) {
  const __m256i a = _mm256_set1_epi16(-93), b = _mm256_set1_epi16(117);
  for (int64_t i = 0; i < iterations; ++i) __asm__ volatile(TEN_TIMES(MADD) : : "x"(a), "x"(b) : CLOBBERS);
  return 2.0 * 16 * 10 * static_cast<double>(iterations);
}

double fma_loop(int64_t iterations) {
  const __m256 a = _mm256_set1_ps(-0.7f), b = _mm256_set1_ps(1.3f);  // v * a + b converges: no denormals
  for (int64_t i = 0; i < iterations; ++i) __asm__ volatile(TEN_TIMES(FMA) : : "x"(a), "x"(b) : CLOBBERS);
  return 2.0 * 8 * 10 * static_cast<double>(iterations);
}

uint64_t read_loop(const void* data, int64_t bytes) {
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
  for (const __m256i* end = p + bytes / 128 * 4; p != end; p += 4) {
    s0 = _mm256_add_epi64(s0, _mm256_loadu_si256(p));
    s1 = _mm256_add_epi64(s1, _mm256_loadu_si256(p + 1));
    s2 = _mm256_add_epi64(s2, _mm256_loadu_si256(p + 2));
    s3 = _mm256_add_epi64(s3, _mm256_loadu_si256(p + 3));
  }
  alignas(32) uint64_t lane[4];
  const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(s0, s1), _mm256_add_epi64(s2, s3));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
  return lane[0] + lane[1] + lane[2] + lane[3];
}

}  // namespace octavo::cpu::avx2
#endif
