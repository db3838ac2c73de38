#pragma once
// The list of flagged columns, made by one block.
#include "common/reduce.h"
#include "outlier/outlier.h"

namespace octavo::GPU_NS {

// Each pass takes 8192 flags, 8 per thread, and continues from the previous pass's total.
constexpr int kCompactThreads = 1024, kFlagsPerThread = 8;

// All kCompactThreads threads of a block; p.flags has been written, by this block behind a barrier.
__device__ inline void compact_flags(const CompactColumns& p) {
  SHARED(int32_t, scratch, [2][kMaxWarps]);
  int64_t count = 0;
  int phase = 0;
  for (int64_t begin = 0; begin < p.cols; begin += kCompactThreads * kFlagsPerThread) {
    const int64_t first = begin + threadIdx.x * kFlagsPerThread;
    uint32_t found = 0;
    UNROLL for (int e = 0; e < kFlagsPerThread; ++e) {
      if (first + e < p.cols && p.flags[first + e] != 0) found |= 1u << e;
    }
    int32_t total;
    int64_t slot = count + block_exclusive_sum(__popc(found), scratch[phase], total);
    UNROLL for (int e = 0; e < kFlagsPerThread; ++e) {
      if (found >> e & 1) p.columns[slot++] = static_cast<int32_t>(first + e);
    }
    count += total;
    phase ^= 1;
  }
  for (int64_t j = count + threadIdx.x; j < p.cols; j += kCompactThreads) p.columns[j] = -1;
  if (threadIdx.x == 0) *p.count = static_cast<int32_t>(count);
}

}  // namespace octavo::GPU_NS
