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
    return to_float(*p);
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
};

}  // namespace
}  // namespace octavo::cpu::portable
