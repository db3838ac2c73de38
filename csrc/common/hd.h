#pragma once
#include <cstddef>
#include <cstdint>

// HD marks what every machine shares: nvcc compiles it for host and device, g++ as plain inline.
#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace octavo {

using Stream = void*;  // a cudaStream_t, opaque so that .cpp files need no CUDA header; null on the CPU

HD constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace octavo
