#pragma once
// Every inline-assembly instruction octavo uses, one named helper each: asm for the device, the same meaning on the
// host SIMT machine. __dp4a, votes and shuffles are CUDA intrinsics already.
#include "common/launch.h"
#ifndef __CUDACC__
#include "simt/async_copy.h"
#endif

namespace octavo::GPU_NS {

// Raises a flag that other threads, of this block or another, may be raising too: an ordinary store would be a race.
__device__ __forceinline__ void set_flag(uint8_t* flag) {
#if !defined(__CUDACC__)
  __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
#else
  asm volatile("st.relaxed.gpu.u8 [%0], %1;" ::"l"(flag), "r"(1));
#endif
}

// Starts a copy of 16 bytes from global to shared memory; only the first `bytes` are read, the rest becomes zero.
// Both addresses are 16-byte aligned. Before sm_80 the copy is simply made.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
#if !defined(__CUDACC__)
  simt_machine::start_copy_16(shared, global, bytes);
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (bytes == 16) {
    value = *static_cast<const uint4*>(global);
  } else {
    for (int i = 0; i < bytes; ++i)
      reinterpret_cast<unsigned char*>(&value)[i] = static_cast<const unsigned char*>(global)[i];
  }
  *static_cast<uint4*>(shared) = value;
#endif
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if !defined(__CUDACC__)
  simt_machine::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are on their way. Other threads' data needs a barrier too.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(__CUDACC__)
  simt_machine::finish_copies(pending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace octavo::GPU_NS
