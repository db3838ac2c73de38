// Every helper of common/ptx.h in a kernel: cuda-check assembles them for each architecture, machine.cpp runs them.
#include "common/ptx.h"

namespace octavo::GPU_NS {

// What shared memory holds before any wait, after the wait for the first of two groups (both places), and in the end.
__global__ void async_copy_kernel(const int4* in, int4* seen) {
  SHARED(int4, tile, [2]);
  cp_async_16(&tile[0], in);
  cp_async_commit();
  cp_async_16(&tile[1], in + 1, 4);
  cp_async_commit();
  seen[0] = tile[0];
  cp_async_wait<1>();
  seen[1] = tile[0];
  seen[2] = tile[1];
  cp_async_wait<0>();
  seen[3] = tile[1];
}

void async_copy(const int4* in, int4* seen, Stream stream) {
  LAUNCH(async_copy_kernel, 1, 1, 0, stream, in, seen);
}

// All threads of two blocks raise the first two flags.
__global__ void raise_flags_kernel(uint8_t* flags) {
  set_flag(flags + threadIdx.x % 2);
}

void raise_flags(uint8_t* flags, Stream stream) {
  LAUNCH(raise_flags_kernel, 2, 64, 0, stream, flags);
}

}  // namespace octavo::GPU_NS
