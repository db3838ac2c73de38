#pragma once
#include <cstddef>
#include <cstdint>

// HD marks what every machine shares: nvcc compiles it for host and device, g++ inlines it everywhere, so that no copy
// compiled for AVX-512 is left over as a weak symbol that an older CPU could be handed by the linker.
#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

namespace octavo {

using Stream = void*;  // a cudaStream_t, opaque so that .cpp files need no CUDA header; null on the CPU

HD constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace octavo
