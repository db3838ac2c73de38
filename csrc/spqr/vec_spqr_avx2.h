#pragma once
// What spqr_loops.h asks of a vector type beyond cpu/vec_avx2.h: eight lanes. After the target pragma.
namespace octavo::cpu::avx2 {
namespace {

struct SpqrVec : Vec {
  static float to_float_one(float v) { return v; }
  static float to_float_one(Half v) { return _cvtsh_ss(v.bits); }
  static float to_float_one(BFloat16 v) { return octavo::to_float(v); }

  // Rows lane ... lane + 7: two bytes of each by a shuffle, then a shift. A record is at most 16 bytes.
  static U bit_fields(const uint8_t* record, int width, int lane) {
    __m128i bytes = _mm_setzero_si128();
    __builtin_memcpy(&bytes, record, static_cast<size_t>(2 * width));
    const __m256i both = _mm256_broadcastsi128_si256(bytes);
    const __m256i bit = _mm256_mullo_epi32(_mm256_add_epi32(lane_ids(), _mm256_set1_epi32(lane)), set_bits(width));
    const __m256i byte = _mm256_srli_epi32(bit, 3);
    // Byte b, byte b + 1 (beyond the record: zero, the copy is padded), zero, zero.
    const __m256i control =
        _mm256_or_si256(_mm256_or_si256(byte, _mm256_slli_epi32(_mm256_add_epi32(byte, _mm256_set1_epi32(1)), 8)),
                        _mm256_set1_epi32(static_cast<int>(0x80800000u)));
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(both, control), _mm256_and_si256(bit, _mm256_set1_epi32(7)));
  }
  static void halves_to_floats(const Half* p, float* out) {
    _mm_storeu_ps(out, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F high_halves(U words) {
    const __m256i high = _mm256_srli_epi32(words, 16);
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
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
      const F of_x = _mm256_i32gather_ps(x, _mm256_and_si256(word, _mm256_set1_epi32(0xffff)), 4);
      sum = fma(high_halves(word), of_x, sum);
    }
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace
}  // namespace octavo::cpu::avx2
