#pragma once
// sum_e values[e] x[columns[e]] over the entries of a sparse row: what every product with one row of x is made of.
// For ISA files, after the target pragma: those of AVX2 and above define OCTAVO_ISA_AVX2 (g++ defines __AVX2__ by its
// command line only), the portable one nothing. <immintrin.h> and common/numeric.h come first.
//
// x is fp32 and lies in cache. A 16-lane gather takes longer than its 16 loads (Zen 4: 0.40 ns an entry against 0.30 to
// 0.34), so four elements are put together by loads and inserts. Where columns follow each other, as in full rows and
// in the stripes of attention heads, x is read in whole vectors instead.

namespace octavo::cpu {
namespace {

#ifdef OCTAVO_ISA_AVX2

inline __m128 four_values(const float* p) {
  return _mm_loadu_ps(p);
}
inline __m128 four_values(const Half* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline __m128 four_values(const BFloat16* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
}

// p[columns[0 ... 3]]
template <class C>
inline __m128 four_at(const float* p, const C* columns) {
  __m128 v = _mm_load_ss(p + static_cast<uint32_t>(columns[0]));
  v = _mm_insert_ps(v, _mm_load_ss(p + static_cast<uint32_t>(columns[1])), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(p + static_cast<uint32_t>(columns[2])), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(p + static_cast<uint32_t>(columns[3])), 0x30);
}

inline __m256i eight_columns(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i eight_columns(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Whether sixteen columns follow each other. Equal ones among them can pass the first test.
template <class C>
inline bool consecutive(const C* columns) {
  const auto first = static_cast<uint32_t>(columns[0]);
  if (__builtin_expect(columns[15] - first != 15, 1)) return false;
  const __m256i low =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  const __m256i same = _mm256_and_si256(_mm256_cmpeq_epi32(eight_columns(columns), low),
                                        _mm256_cmpeq_epi32(eight_columns(columns + 8), high));
  return _mm256_movemask_epi8(same) == -1;
}

// Every column must be an index of x. T: float, Half, BFloat16; C: uint16_t, uint32_t.
template <class T, class C>
HD float row_dot(const T* values, const C* columns, int64_t count, const float* x) {
  // What is left of a row, and short rows, one by one: more loops would be more branches that cannot be foreseen.
  const auto one_by_one = [&](int64_t e) __attribute__((always_inline)) {
    float sum = 0.0f;
#pragma GCC unroll 1
    for (; e < count; ++e) sum = __builtin_fmaf(to_float(values[e]), x[static_cast<uint32_t>(columns[e])], sum);
    return sum;
  };
  if (count < 16) return one_by_one(0);
  __m128 low = _mm_setzero_ps(), high = _mm_setzero_ps();
  const auto eight = [&](int64_t e) __attribute__((always_inline)) {
    low = _mm_fmadd_ps(four_values(values + e), four_at(x, columns + e), low);
    high = _mm_fmadd_ps(four_values(values + e + 4), four_at(x, columns + e + 4), high);
  };
  int64_t e = 0;
  for (; e + 16 <= count; e += 16) {
    if (consecutive(columns + e)) {
      const float* from = x + static_cast<uint32_t>(columns[e]);
      low = _mm_fmadd_ps(four_values(values + e), _mm_loadu_ps(from), low);
      high = _mm_fmadd_ps(four_values(values + e + 4), _mm_loadu_ps(from + 4), high);
      low = _mm_fmadd_ps(four_values(values + e + 8), _mm_loadu_ps(from + 8), low);
      high = _mm_fmadd_ps(four_values(values + e + 12), _mm_loadu_ps(from + 12), high);
    } else {
      eight(e);
      eight(e + 8);
    }
  }
  if (e + 8 <= count) {
    eight(e);
    e += 8;
  }
  const float rest = one_by_one(e);
  low = _mm_add_ps(low, high);
  low = _mm_add_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_add_ss(low, _mm_movehdup_ps(low))) + rest;
}

// The largest column; 0 of none. One pass over many columns costs less than a comparison with each use.
inline uint32_t most_column(const uint16_t* columns, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  int64_t e = 0;
  for (; e + 16 <= count; e += 16)
    most = _mm256_max_epu16(most, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + e)));
  const __m128i low = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  // The smallest of the complements is the complement of the largest.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(low, _mm_set1_epi16(-1)));
  uint32_t result = ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffffu;
  for (; e < count; ++e) result = columns[e] > result ? columns[e] : result;
  return result;
}
inline uint32_t most_column(const uint32_t* columns, int64_t count) {
  __m256i most = _mm256_setzero_si256(), other = most;
  int64_t e = 0;
  for (; e + 16 <= count; e += 16) {
    most = _mm256_max_epu32(most, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + e)));
    other = _mm256_max_epu32(other, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + e + 8)));
  }
  most = _mm256_max_epu32(most, other);
  __m128i low = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  low = _mm_max_epu32(low, _mm_shuffle_epi32(low, 0x4e));
  low = _mm_max_epu32(low, _mm_shuffle_epi32(low, 0xb1));
  uint32_t result = static_cast<uint32_t>(_mm_cvtsi128_si32(low));
  for (; e < count; ++e) result = columns[e] > result ? columns[e] : result;
  return result;
}

#else

template <class C>
inline uint32_t most_column(const C* columns, int64_t count) {
  uint32_t most = 0;
  for (int64_t e = 0; e < count; ++e) most = columns[e] > most ? columns[e] : most;
  return most;
}

template <class T, class C>
HD float row_dot(const T* values, const C* columns, int64_t count, const float* x) {
  float sum[4] = {};
  for (int64_t e = 0; e < count; ++e) sum[e & 3] += to_float(values[e]) * x[static_cast<uint32_t>(columns[e])];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

#endif

}  // namespace
}  // namespace octavo::cpu
