#pragma once
// What spqr_loops.h asks of a vector type beyond cpu/vec_avx512.h: sixteen lanes. After the target pragma.
namespace octavo::cpu::avx512 {
namespace {

struct SpqrVec : Vec {
  static float to_float_one(float v) { return v; }
  static float to_float_one(Half v) { return _cvtsh_ss(v.bits); }
  static float to_float_one(BFloat16 v) { return octavo::to_float(v); }

  // Two bytes of each row by a shuffle, then a shift. A record is at most 16 bytes.
  struct BitFields {
    __mmask16 bytes;
    __m512i control, shift;
    explicit BitFields(int width) : bytes(static_cast<__mmask16>((1u << (2 * width)) - 1)) {
      const __m512i bit = _mm512_mullo_epi32(lane_ids(), _mm512_set1_epi32(width));
      const __m512i byte = _mm512_srli_epi32(bit, 3);
      // Byte b, byte b + 1 (beyond the record: zero, the load is masked), zero, zero.
      control = _mm512_ternarylogic_epi32(byte, _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(1)), 8),
                                          _mm512_set1_epi32(static_cast<int>(0x80800000u)), 0xfe);
      shift = _mm512_and_si512(bit, _mm512_set1_epi32(7));
    }
    __attribute__((always_inline)) U operator()(const uint8_t* record) const {
      const __m512i all = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(bytes, record));
      return _mm512_srlv_epi32(_mm512_shuffle_epi8(all, control), shift);
    }
  };
  static U bit_fields(const uint8_t* record, int width, int) { return BitFields(width)(record); }
  static void halves_to_floats(const Half* p, float* out) {
    _mm_storeu_ps(out, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F high_halves(U words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16))); }
  static void high_halves_to_floats(const uint32_t* words, int64_t count, float* out) {
    for (int64_t e = 0; e < count; e += kWidth) {
      const int n = static_cast<int>(count - e < kWidth ? count - e : kWidth);
      store(out + e, high_halves(load_bits(words + e, n)), n);
    }
  }
  static float sparse_dot(const uint32_t* words, int64_t count, const float* x) {
    F sum = set(0.0f);
    for (int64_t e = 0; e < count; e += kWidth) {
      const int n = static_cast<int>(count - e < kWidth ? count - e : kWidth);
      const U word = load_bits(words + e, n);  // lanes beyond n: value 0 of column 0
      const F of_x = _mm512_i32gather_ps(_mm512_and_si512(word, _mm512_set1_epi32(0xffff)), x, 4);
      sum = fma(high_halves(word), of_x, sum);
    }
    return _mm512_reduce_add_ps(sum);
  }
};

}  // namespace
}  // namespace octavo::cpu::avx512
