#pragma once
// Reductions over a warp or a block. Every lane of the warp (thread of the block) must call them.
#include "common/launch.h"

namespace octavo::GPU_NS {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;  // warps of the largest block

__device__ inline uint32_t warp_max(uint32_t v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, v);
#else
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, v, distance);
    v = other > v ? other : v;
  }
  return v;
#endif
}

__device__ inline int32_t warp_sum(int32_t v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, v);
#else
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
#endif
}

// The maximum over a one-dimensional block, in every thread. One barrier only: a second call needs other scratch
// (two that alternate are enough, since a call's barrier ends all reads of the call before it).
__device__ inline uint32_t block_max(uint32_t v, uint32_t (&scratch)[kMaxWarps]) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_max(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : 0);
}

// The sum of v over the threads before this one; total gets the block's sum. One-dimensional blocks. The same rule
// for scratch as block_max.
__device__ inline int32_t block_exclusive_sum(int32_t v, int32_t (&scratch)[kMaxWarps], int32_t& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int32_t inclusive = v;
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  // Every warp adds up the warps before it, and all warps, for itself: cheaper than a second barrier.
  const int32_t sum = lane < warps ? scratch[lane] : 0;
  total = warp_sum(sum);
  return warp_sum(lane < warp ? sum : 0) + inclusive - v;
}

}  // namespace octavo::GPU_NS
