#pragma once
// Lets a .cu file be compiled twice: by nvcc (namespace cuda) and, on simt/simt.h, by g++ (namespace simt).
//   LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)   launches and checks the launch
//   SHARED(type, name, [count])            static shared memory:   SHARED(float, tile, [32][33]);
//   DYNAMIC_SHARED(type, name)             the block's dynamic shared memory as type* name
//   fill_bytes(pointer, byte, bytes, stream)
//   multiprocessors()                      of the current device: how many blocks run at once, at least
//   resident_blocks(kernel, threads)       how many of its blocks the current device runs at once: a persistent grid
//   UNROLL, NO_UNROLL                      before a loop whose arrays must stay in registers; before one seldom run
//   UNROLL_BY_8                            before a loop of gathers, so that some are under way together
#include "common/hd.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define GPU_NS cuda
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_8 _Pragma("unroll 8")
#define NO_UNROLL _Pragma("unroll 1")
#define TRAP() __trap()
#define SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name)                                       \
  extern __shared__ __align__(16) unsigned char octavo_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(octavo_dynamic_shared)
#define LAUNCH(kernel, grid, block, smem, stream, ...)                             \
  do {                                                                             \
    kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::octavo::check_cuda(cudaGetLastError(), "launch of " #kernel);                \
  } while (0)

namespace octavo {
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("octavo: ") + what + ": " + cudaGetErrorString(status));
}
inline void fill_bytes(void* data, int byte, size_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(data, byte, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}
template <class Kernel>
int resident_blocks(Kernel kernel, int threads) {
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "occupancy");
  return (blocks > 0 ? blocks : 1) * multiprocessors();
}
}  // namespace octavo
#else
#define UNROLL
#define UNROLL_BY_8
#define NO_UNROLL
#include "simt/simt.h"
#endif
