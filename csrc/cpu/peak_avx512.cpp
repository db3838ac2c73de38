#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "cpu/peak.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include above; never popped

namespace octavo::cpu::avx512 {

// As in peak_avx2.cpp, with twelve accumulators.
#define TWELVE_TIMES(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#define DOT(n) "vpdpbusd %0, %1, %%zmm" #n "\n"
#define FMA(n) "vfmadd132ps %0, %1, %%zmm" #n "\n"

double int8_loop(int64_t iterations) {
  const __m512i a = _mm512_set1_epi8(-93), b = _mm512_set1_epi8(117);
  for (int64_t i = 0; i < iterations; ++i) __asm__ volatile(TWELVE_TIMES(DOT) : : "v"(a), "v"(b) : CLOBBERS);
  return 2.0 * 64 * 12 * static_cast<double>(iterations);
}

double fma_loop(int64_t iterations) {
  const __m512 a = _mm512_set1_ps(-0.7f), b = _mm512_set1_ps(1.3f);  // v * a + b converges: no denormals
  for (int64_t i = 0; i < iterations; ++i) __asm__ volatile(TWELVE_TIMES(FMA) : : "v"(a), "v"(b) : CLOBBERS);
  return 2.0 * 16 * 12 * static_cast<double>(iterations);
}

uint64_t read_loop(const void* data, int64_t bytes) {
  const __m512i* p = static_cast<const __m512i*>(data);
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
  for (const __m512i* end = p + bytes / 256 * 4; p != end; p += 4) {
    s0 = _mm512_add_epi64(s0, _mm512_loadu_si512(p));
    s1 = _mm512_add_epi64(s1, _mm512_loadu_si512(p + 1));
    s2 = _mm512_add_epi64(s2, _mm512_loadu_si512(p + 2));
    s3 = _mm512_add_epi64(s3, _mm512_loadu_si512(p + 3));
  }
  alignas(64) uint64_t lane[8];
  _mm512_store_si512(lane, _mm512_add_epi64(_mm512_add_epi64(s0, s1), _mm512_add_epi64(s2, s3)));
  uint64_t sum = 0;
  for (const uint64_t v : lane) sum += v;
  return sum;
}

}  // namespace octavo::cpu::avx512
#endif
