#pragma once
// One element as the vector type V that rules are written over (cpu/vec_*.h have more lanes): what a GPU thread uses.
// Divisions and roots are IEEE-rounded, as nvcc makes them unless told otherwise.
#include <cmath>

#include "common/hd.h"

namespace octavo {

struct Lane {
  using F = float;

  static HD F set(float v) { return v; }
  static HD F add(F a, F b) { return a + b; }
  static HD F sub(F a, F b) { return a - b; }
  static HD F mul(F a, F b) { return a * b; }
  static HD F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static HD F div(F a, F b) { return a / b; }
  static HD F sqrt(F a) { return sqrtf(a); }
  static HD F max(F a, F b) { return a > b ? a : b; }
  static HD F sign(F v) { return static_cast<F>(v > 0.0f) - static_cast<F>(v < 0.0f); }  // 0 for 0
};

}  // namespace octavo
