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
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F with_sign_of(F v, F sign) {  // v | (sign & 0x80000000)
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xf8));
  }
  static F times_sign_of(F v, F sign) {  // v ^ (sign & 0x80000000)
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0x78));
  }
  static F sign(F v) {  // 0 for 0
    return with_sign_of(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_OQ), set(1.0f)), v);
  }

  using M = __mmask16;
  static M finite(F v) { return static_cast<M>(~_mm512_fpclass_ps_mask(v, 0x99)); }  // neither NaN nor Inf
  static bool all(M mask) { return mask == 0xffff; }
  static M positive(F v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ); }
  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M both(M a, M b) { return static_cast<M>(a & b); }
  static M lanes_below(int n) { return lanes(n); }
  static F select(M mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static int count(M mask) { return __builtin_popcount(mask); }

  static U set_bits(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static U bits(F v) { return _mm512_castps_si512(v); }
  static F from_bits(U v) { return _mm512_castsi512_ps(v); }
  static U add_bits(U a, U b) { return _mm512_add_epi32(a, b); }
  static U mul_bits(U a, U b) { return _mm512_mullo_epi32(a, b); }
  static U and_bits(U a, U b) { return _mm512_and_si512(a, b); }
  static U xor_bits(U a, U b) { return _mm512_xor_si512(a, b); }
  template <int n>
  static U shift_right(U v) {
    return _mm512_srli_epi32(v, n);
  }
  static U lane_ids() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static U load_codes(const uint8_t* p, int n = kWidth) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p));
  }
  static void store_codes(uint8_t* p, U codes, int n = kWidth) {
    _mm_mask_storeu_epi8(p, lanes(n), _mm512_cvtepi32_epi8(codes));
  }
  static void store_high_halves(BFloat16* p, U v, int n = kWidth) {
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
  }
  struct Sum {  // of many vectors, in double
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  };
  static void add_to(Sum& sum, F v) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  static double total(const Sum& sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }
  static double sum_of_squares(F v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_fmadd_pd(high, high, _mm512_mul_pd(low, low)));
  }

  // What blockwise/codec.h needs: tables in registers, and the arithmetic on codes. Indices count modulo the size.
  // The smaller magnitude of q and limit >= 0, with q's sign.
  // q, at least 1, where v is positive; elsewhere 0.
  static F from_1_where_positive(F q, F v) { return _mm512_maskz_max_ps(positive(v), q, set(1.0f)); }
  // Levels -128 ... 128 as codes level + 127, the lowest of which is 0.
  static void store_signed_codes(uint8_t* p, U levels, int n = kWidth) {
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_add_epi32(levels, _mm512_set1_epi32(-1)));
    _mm_mask_storeu_epi8(p, lanes(n), _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))));
  }
  using Table8 = __m512;
  static Table8 table8(const float* p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
  static F lookup(Table8 table, U index) { return _mm512_permutexvar_ps(index, table); }
  struct Table32 {
    __m512i low, high;
  };
  static Table32 table32(const uint32_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 16)}; }
  static U lookup(const Table32& table, U index) { return _mm512_permutex2var_epi32(table.low, index, table.high); }
  using Table16 = __m512;
  static Table16 table16(const float* p) { return _mm512_loadu_ps(p); }
  static F lookup16(Table16 table, U index) { return _mm512_permutexvar_ps(index, table); }
  // even[0], odd[0], even[1], ... as two vectors.
  static void interleave(F even, F odd, F& first, F& second) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first = _mm512_permutex2var_ps(even, order, odd);
    second = _mm512_permutex2var_ps(even, _mm512_add_epi32(order, _mm512_set1_epi32(8)), odd);
  }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }

  // Bytes of two 4-bit codes, the upper one first, to 16-bit numbers of a table of 16.
  static constexpr bool kLooksUpHalves = true;
  using HalfTable = __m512i;
  template <class T>
  static HalfTable half_table(F values) {
    alignas(32) T table[16];
    store(table, values);
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
  }
  template <class T>
  static void look_up_halves(HalfTable table, const uint8_t* bytes, T* out) {  // 16 bytes
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table));
  }
  static U rotate_left_1(U v) { return _mm512_rol_epi32(v, 1); }
  static U shift_right_by(U v, U n) { return _mm512_srlv_epi32(v, n); }
  static F to_float(U v) { return _mm512_cvtepi32_ps(v); }
  static F floor(F v) { return _mm512_roundscale_ps(v, 0x09); }
  static F round(F v) { return _mm512_roundscale_ps(v, 0x08); }  // half to even
  static U to_integer(F v) { return _mm512_cvtps_epi32(v); }     // half to even
  static F abs(F v) { return _mm512_abs_ps(v); }
  static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static uint32_t lane_bits(M mask) { return mask; }
};

}  // namespace
}  // namespace octavo::cpu::avx512
