#pragma once
// CUDA C++ for g++: what common/launch.h includes where nvcc does not compile the file.
#include <cstdlib>
#include <cstring>

#include "common/hd.h"
#include "simt/intrinsics.h"
#include "simt/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define GPU_NS simt
#define TRAP() std::abort()
#define SHARED(type, name, ...)           \
  using name##_shared = type __VA_ARGS__; \
  static char name##_declaration;         \
  name##_shared& name =                   \
      *static_cast<name##_shared*>(::octavo::simt_machine::shared_memory(&name##_declaration, sizeof(name##_shared)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::octavo::simt_machine::dynamic_shared_memory())
#define LAUNCH(kernel, grid, block, smem, stream, ...)                                               \
  do {                                                                                               \
    static_cast<void>(stream);                                                                       \
    ::octavo::simt_machine::launch_kernel(                                                           \
        {#kernel, ::octavo::simt_machine::Where::current(), grid, block, static_cast<size_t>(smem)}, \
        kernel __VA_OPT__(, ) __VA_ARGS__);                                                          \
  } while (0)

namespace octavo {
inline void fill_bytes(void* data, int byte, size_t bytes, Stream) {
  std::memset(data, byte, bytes);
}
inline int multiprocessors() {
  return 2;  // few, so that small matrices are large enough for every kernel
}
template <class Kernel>
int resident_blocks(Kernel, int) {
  return 3;  // few and odd: blocks take several turns, and not equally many
}
}  // namespace octavo
