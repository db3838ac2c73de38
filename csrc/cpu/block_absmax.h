#pragma once
// The largest magnitude in a block of x, over a vector type V (cpu/vec_*.h). ISA files only, after the target pragma.
#include "common/numeric.h"

namespace octavo::cpu {
namespace {

struct BlockMost {
  float most;   // of the finite elements
  bool finite;  // all of them
};

template <class V, class T>
BlockMost block_most(const T* x, int64_t count) {
  typename V::U most = V::zero_bits();
  int64_t j = 0;
  for (; j + V::kWidth <= count; j += V::kWidth) most = V::max_bits(most, V::abs_bits(V::load(x + j)));
  if (j < count) most = V::max_bits(most, V::abs_bits(V::load(x + j, static_cast<int>(count - j))));
  uint32_t bits = V::reduce_max(most);
  const bool finite = bits < 0x7f800000u;
  if (!finite) {
    bits = 0;
    for (j = 0; j < count; ++j) {
      const uint32_t of_one = abs_bits(to_float(x[j]));
      if (of_one < 0x7f800000u && of_one > bits) bits = of_one;
    }
  }
  return {bits_float(bits), finite};
}

}  // namespace
}  // namespace octavo::cpu
