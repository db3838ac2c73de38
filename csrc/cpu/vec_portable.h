#pragma once
// One lane of the vector interface that the loops in *_loops.h are written in. vec_avx2.h and vec_avx512.h offer the
// same names with 8 and 16 lanes; their results are the same to the bit.
#include "common/numeric.h"

namespace octavo::cpu::portable {
namespace {

struct Vec {
  static constexpr int kWidth = 1;
  using F = float;
  using U = uint32_t;

  template <class T>
  static F load(const T* p, int = kWidth) {
    return octavo::to_float(*p);
  }
  static F load(const int8_t* p, int = kWidth) { return static_cast<float>(*p); }
  static F load(const int32_t* p, int = kWidth) { return static_cast<float>(*p); }
  template <class T>
  static void store(T* p, F v, int = kWidth) {
    *p = from_float<T>(v);
  }
  static F set(float v) { return v; }
  static U load_bits(const uint32_t* p, int = kWidth) { return *p; }
  static void store_bits(uint32_t* p, U v, int = kWidth) { *p = v; }
  static U zero_bits() { return 0; }
  static U abs_bits(F v) { return octavo::abs_bits(v); }
  static U max_bits(U a, U b) { return a > b ? a : b; }
  static uint32_t reduce_max(U v) { return v; }
  static uint32_t outliers(F v, float threshold) { return is_outlier(v, threshold); }  // one bit per lane
  static uint32_t nonzero(const uint8_t* p, int = kWidth) { return *p != 0; }          // one bit per lane
  static F drop(F v, uint32_t mask) { return mask ? 0.0f : v; }                        // lanes of the mask become 0
  static void encode(int8_t* codes, F v, F inverse, int = kWidth) { *codes = octavo::encode(v, inverse); }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return std::fmaf(a, b, c); }
  static F sub(F a, F b) { return a - b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F a) { return std::sqrt(a); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F with_sign_of(F v, F sign) { return bits_float(float_bits(v) | (float_bits(sign) & 0x80000000u)); }  // v >= 0
  static F sign(F v) { return static_cast<F>(v > 0.0f) - static_cast<F>(v < 0.0f); }  // 0 for 0

  using M = bool;  // a lane mask
  static M finite(F v) { return octavo::abs_bits(v) < 0x7f800000u; }
  static bool all(M mask) { return mask; }
  static M positive(F v) { return v > 0.0f; }
  static M greater(F a, F b) { return a > b; }
  static M at_least(F a, F b) { return a >= b; }
  static M equal(F a, F b) { return a == b; }
  static M both(M a, M b) { return a && b; }
  static M lanes_below(int n) { return n > 0; }
  static F select(M mask, F yes, F no) { return mask ? yes : no; }
  static int count(M mask) { return mask; }

  static F floor(F v) { return std::floor(v); }
  static F to_float(U v) { return static_cast<F>(v); }                 // below 2^31
  static F round(F v) { return std::nearbyintf(v); }                   // half to even
  static U to_integer(F v) { return static_cast<U>(std::lrintf(v)); }  // half to even
  static U set_bits(uint32_t v) { return v; }
  static U bits(F v) { return float_bits(v); }
  static F from_bits(U v) { return bits_float(v); }
  static U add_bits(U a, U b) { return a + b; }
  static U mul_bits(U a, U b) { return a * b; }
  static U and_bits(U a, U b) { return a & b; }
  static U xor_bits(U a, U b) { return a ^ b; }
  template <int n>
  static U shift_right(U v) {
    return v >> n;
  }
  static U lane_ids() { return 0; }
  static U load_codes(const uint8_t* p, int = kWidth) { return *p; }
  static void store_codes(uint8_t* p, U codes, int = kWidth) { *p = static_cast<uint8_t>(codes); }
  static void store_high_halves(BFloat16* p, U v, int = kWidth) { p->bits = static_cast<uint16_t>(v >> 16); }
  using Sum = double;
  static void add_to(Sum& sum, F v) { sum += static_cast<double>(v); }
  static double total(Sum sum) { return sum; }
  static double sum_of_squares(F v) { return static_cast<double>(v) * static_cast<double>(v); }
  static float reduce_add(F v) { return v; }
  static constexpr bool kLooksUpHalves = false;  // as vec_avx512.h does

  using Table16 = const float*;
  static Table16 table16(const float* p) { return p; }
  static F lookup16(Table16 table, U index) { return table[index & 15]; }
  static void interleave(F even, F odd, F& first, F& second) { first = even, second = odd; }
};

}  // namespace
}  // namespace octavo::cpu::portable
