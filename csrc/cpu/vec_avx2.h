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
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F with_sign_of(F v, F sign) { return _mm256_or_ps(v, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
  static F times_sign_of(F v, F sign) { return _mm256_xor_ps(v, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
  static F sign(F v) {  // 0 for 0
    return with_sign_of(_mm256_and_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_OQ), set(1.0f)), v);
  }

  using M = __m256;  // all bits of a lane
  static M finite(F v) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f800000), abs_bits(v))); }
  static bool all(M mask) { return _mm256_movemask_ps(mask) == 0xff; }
  static M positive(F v) { return _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ); }
  static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M both(M a, M b) { return _mm256_and_ps(a, b); }
  static M lanes_below(int n) { return _mm256_castsi256_ps(lanes(n)); }
  static F select(M mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }
  static int count(M mask) { return __builtin_popcount(lane_bits(mask)); }

  static U set_bits(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static U bits(F v) { return _mm256_castps_si256(v); }
  static F from_bits(U v) { return _mm256_castsi256_ps(v); }
  static U add_bits(U a, U b) { return _mm256_add_epi32(a, b); }
  static U mul_bits(U a, U b) { return _mm256_mullo_epi32(a, b); }
  static U and_bits(U a, U b) { return _mm256_and_si256(a, b); }
  static U xor_bits(U a, U b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static U shift_right(U v) {
    return _mm256_srli_epi32(v, n);
  }
  static U lane_ids() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static U load_codes(const uint8_t* p, int n = kWidth) {
    uint64_t bytes = 0;
    __builtin_memcpy(&bytes, p, n);
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
  }
  static void store_codes(uint8_t* p, U codes, int n = kWidth) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
    __builtin_memcpy(p, &bytes, n);
  }
  static void store_high_halves(BFloat16* p, U v, int n = kWidth) {
    const __m256i high = _mm256_srli_epi32(v, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    __builtin_memcpy(p, &packed, n * sizeof(BFloat16));
  }
  static double reduce_add(__m256d v) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
  }
  struct Sum {  // of many vectors, in double
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  };
  static void add_to(Sum& sum, F v) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }
  static double total(const Sum& sum) { return reduce_add(_mm256_add_pd(sum.low, sum.high)); }
  static double sum_of_squares(F v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return reduce_add(_mm256_fmadd_pd(high, high, _mm256_mul_pd(low, low)));
  }

  // What blockwise/codec.h needs: tables in registers, and the arithmetic on codes. Indices count modulo the size.
  // The smaller magnitude of q and limit >= 0, with q's sign.
  // q, at least 1, where v is positive; elsewhere 0.
  static F from_1_where_positive(F q, F v) { return _mm256_and_ps(positive(v), max(q, set(1.0f))); }
  // Levels -128 ... 128 as codes level + 127, the lowest of which is 0.
  static void store_signed_codes(uint8_t* p, U levels, int n = kWidth) {
    store_codes(p, _mm256_max_epi32(_mm256_add_epi32(levels, _mm256_set1_epi32(127)), _mm256_setzero_si256()), n);
  }
  using Table8 = __m256;
  static Table8 table8(const float* p) { return _mm256_loadu_ps(p); }
  static F lookup(Table8 table, U index) { return _mm256_permutevar8x32_ps(table, index); }
  struct Table32 {
    __m256 part[4];
  };
  static Table32 table32(const uint32_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    return {{_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8), _mm256_loadu_ps(f + 16), _mm256_loadu_ps(f + 24)}};
  }
  static U lookup(const Table32& table, U index) {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)),
                 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
    const __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.part[0], index),
                                        _mm256_permutevar8x32_ps(table.part[1], index), bit3);
    const __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.part[2], index),
                                         _mm256_permutevar8x32_ps(table.part[3], index), bit3);
    return _mm256_castps_si256(_mm256_blendv_ps(low, high, bit4));
  }
  struct Table16 {
    __m256 low, high;
  };
  static Table16 table16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F lookup16(const Table16& table, U index) {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                            bit3);
  }
  // even[0], odd[0], even[1], ... as two vectors.
  static void interleave(F even, F odd, F& first, F& second) {
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    first = _mm256_permute2f128_ps(low, high, 0x20);
    second = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static constexpr bool kLooksUpHalves = false;  // as vec_avx512.h does
  static float reduce_add(F v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static U rotate_left_1(U v) { return _mm256_or_si256(_mm256_slli_epi32(v, 1), _mm256_srli_epi32(v, 31)); }
  static U shift_right_by(U v, U n) { return _mm256_srlv_epi32(v, n); }
  static F to_float(U v) { return _mm256_cvtepi32_ps(v); }
  static F floor(F v) { return _mm256_round_ps(v, 0x09); }
  static F round(F v) { return _mm256_round_ps(v, 0x08); }    // half to even
  static U to_integer(F v) { return _mm256_cvtps_epi32(v); }  // half to even
  static F abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static uint32_t lane_bits(M mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
};

}  // namespace
}  // namespace octavo::cpu::avx2
