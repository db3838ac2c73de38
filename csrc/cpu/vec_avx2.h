#pragma once
// Eight lanes of the interface of vec_portable.h. Include after the target pragma of an *_avx2.cpp file.

namespace octavo::cpu::avx2 {
namespace {

struct Vec {
  static constexpr int kWidth = 8;
  using F = __m256;
  using U = __m256i;

  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // A partial vector goes through a zeroed buffer: nothing outside [p, p + n) is touched.
  template <class T>
  static F load_part(const T* p, int n) {
    alignas(32) T part[kWidth] = {};
    __builtin_memcpy(part, p, n * sizeof(T));
    return load(part);
  }
  static F load(const float* p, int n = kWidth) {
    return n == kWidth ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes(n));
  }
  static F load(const Half* p, int n = kWidth) {
    if (n != kWidth) return load_part(p, n);
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load(const BFloat16* p, int n = kWidth) {
    if (n != kWidth) return load_part(p, n);
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static F load(const int8_t* p, int n = kWidth) {
    if (n != kWidth) return load_part(p, n);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load(const int32_t* p, int n = kWidth) {
    return _mm256_cvtepi32_ps(n == kWidth ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                          : _mm256_maskload_epi32(p, lanes(n)));
  }
  static void store(float* p, F v, int n = kWidth) {
    n == kWidth ? _mm256_storeu_ps(p, v) : _mm256_maskstore_ps(p, lanes(n), v);
  }
  static void store(Half* p, F v, int n = kWidth) {
    alignas(16) Half part[kWidth];
    Half* to = n == kWidth ? p : part;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    if (n != kWidth) __builtin_memcpy(p, part, n * sizeof(Half));
  }
  static void store(BFloat16* p, F v, int n = kWidth) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    alignas(16) BFloat16 part[kWidth];
    BFloat16* to = n == kWidth ? p : part;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
    if (n != kWidth) __builtin_memcpy(p, part, n * sizeof(BFloat16));
  }
  static F set(float v) { return _mm256_set1_ps(v); }
  static U load_bits(const uint32_t* p, int n = kWidth) {
    return n == kWidth ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                       : _mm256_maskload_epi32(reinterpret_cast<const int*>(p), lanes(n));
  }
  static void store_bits(uint32_t* p, U v, int n = kWidth) {
    n == kWidth ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v)
                : _mm256_maskstore_epi32(reinterpret_cast<int*>(p), lanes(n), v);
  }
  static U zero_bits() { return _mm256_setzero_si256(); }
  static U abs_bits(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
  static U max_bits(U a, U b) { return _mm256_max_epu32(a, b); }
  static uint32_t reduce_max(U v) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }
  static uint32_t outliers(F v, float threshold) {
    const __m256 magnitude = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, set(threshold), _CMP_GE_OQ)));
  }
  static uint32_t nonzero(const uint8_t* p, int n = kWidth) {
    uint64_t bytes = 0;
    __builtin_memcpy(&bytes, p, n);
    if (bytes == 0) return 0;
    const __m128i zero = _mm_cmpeq_epi8(_mm_cvtsi64_si128(static_cast<long long>(bytes)), _mm_setzero_si128());
    return ~static_cast<uint32_t>(_mm_movemask_epi8(zero)) & 0xffu;
  }
  static F drop(F v, uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i keep =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), _mm256_setzero_si256());
    return _mm256_and_ps(v, _mm256_castsi256_ps(keep));
  }
  // Lanes whose inverse is 0 give code 0 whatever v is; elsewhere |v * inverse| stays below 127.5.
  static void encode(int8_t* codes, F v, F inverse, int n = kWidth) {
    const __m256 zero = _mm256_cmp_ps(inverse, _mm256_setzero_ps(), _CMP_EQ_OQ);
    const __m256i q = _mm256_cvtps_epi32(_mm256_andnot_ps(zero, _mm256_mul_ps(v, inverse)));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    alignas(8) int8_t part[kWidth];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(n == kWidth ? codes : part), bytes);
    if (n != kWidth) __builtin_memcpy(codes, part, n);
  }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace octavo::cpu::avx2
