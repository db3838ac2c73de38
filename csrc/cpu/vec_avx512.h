#pragma once
// Sixteen lanes of the interface of vec_portable.h. Include after the target pragma of an *_avx512.cpp file.

namespace octavo::cpu::avx512 {
namespace {

struct Vec {
  static constexpr int kWidth = 16;
  using F = __m512;
  using U = __m512i;

  static __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F load(const float* p, int n = kWidth) { return _mm512_maskz_loadu_ps(lanes(n), p); }
  static F load(const Half* p, int n = kWidth) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
  static F load(const BFloat16* p, int n = kWidth) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static F load(const int8_t* p, int n = kWidth) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
  }
  static F load(const int32_t* p, int n = kWidth) { return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes(n), p)); }
  static void store(float* p, F v, int n = kWidth) { _mm512_mask_storeu_ps(p, lanes(n), v); }
  static void store(Half* p, F v, int n = kWidth) {
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, F v, int n = kWidth) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
  }
  static F set(float v) { return _mm512_set1_ps(v); }
  static U load_bits(const uint32_t* p, int n = kWidth) { return _mm512_maskz_loadu_epi32(lanes(n), p); }
  static void store_bits(uint32_t* p, U v, int n = kWidth) { _mm512_mask_storeu_epi32(p, lanes(n), v); }
  static U zero_bits() { return _mm512_setzero_si512(); }
  static U abs_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  static U max_bits(U a, U b) { return _mm512_max_epu32(a, b); }
  static uint32_t reduce_max(U v) { return _mm512_reduce_max_epu32(v); }
  static uint32_t outliers(F v, float threshold) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(v), set(threshold), _CMP_GE_OQ);
  }
  static uint32_t nonzero(const uint8_t* p, int n = kWidth) {
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes(n), p);
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static F drop(F v, uint32_t mask) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(~mask), v); }
  // Lanes whose inverse is 0 give code 0 whatever v is; elsewhere |v * inverse| stays below 127.5.
  static void encode(int8_t* codes, F v, F inverse, int n = kWidth) {
    const __mmask16 some = _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i q = _mm512_maskz_cvtps_epi32(some, _mm512_mul_ps(v, inverse));
    _mm_mask_storeu_epi8(codes, lanes(n), _mm512_cvtsepi32_epi8(q));
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace octavo::cpu::avx512
