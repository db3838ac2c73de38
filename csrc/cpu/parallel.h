#pragma once
#include <cstdint>

namespace octavo::cpu {

// Splits [0, count) into ranges of at least `grain` and calls body(begin, end, context) on them, on torch's threads
// (ops.cpp). The library of kernels is torch-free: whoever links it says what runs the ranges.
void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// Rows per range of an elementwise loop: below 32768 elements a second thread costs more than it brings.
constexpr int64_t kElementGrain = 32768;
inline int64_t row_grain(int64_t cols) {
  return cols > 0 ? (kElementGrain + cols - 1) / cols : kElementGrain;
}

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  parallel_ranges(
      count, grain < 1 ? 1 : grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace octavo::cpu
