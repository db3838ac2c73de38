#pragma once
// What both passes of an optimizer over its tensors share on a GPU: states in registers, chunks, the launch. The passes
// are in step_gpu.h and sums_gpu.h. Each optim8_*_cuda.cu instantiates them for some of the rules, since ptxas takes
// long for all and compilers run side by side.
#include <type_traits>

#include "blockwise/codec_gpu.h"
#include "common/lane.h"
#include "common/reduce.h"
#include "optim8/lanes_gpu.h"
#include "optim8/optim8.h"
#include "optim8/rules.h"

namespace octavo::GPU_NS {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;

// ---- states ----

template <class Rule>
struct States {
  static constexpr int kCount = Rule::kMoments + (Rule::kSecond ? 1 : 0);
  static constexpr int kSecondAt = Rule::kMoments;  // of the second moment among them
  static constexpr int kSlots = kCount > 0 ? kCount : 1;
  static HD constexpr bool second(int s) { return s == kSecondAt; }
};

// The states of a lane's elements as they are in memory: codes with their absmax, or floats.
template <class Rule, bool kQuantized, bool kWide>
struct StoredStates {
  using S = States<Rule>;
  uint32_t codes[S::kSlots][kEach / 4];
  float absmax[S::kSlots];
  float floats[S::kSlots][kQuantized ? 1 : kEach];

  __device__ void load(const OptimTensor& t, const BlockPlace& place, int64_t block) {
    UNROLL for (int s = 0; s < S::kCount; ++s) {
      if constexpr (kQuantized) {
        Lanes<kWide>::template load<uint8_t>(t.state[s], place, codes[s], S::second(s) ? 0 : 127);
        absmax[s] = in_global(t.absmax[s])[block];
      } else {
        Lanes<kWide>::template load<float>(t.state[s], place, floats[s], 0);
      }
    }
  }

  // State s of element e as it is kept between steps: of a second moment in 8 bits the root.
  __device__ float value(const StateTable* tables, int s, int e) const {
    if constexpr (kQuantized)
      return (S::second(s) ? state_value<false>(tables[s], codes[s][e / 4], e % 4)
                           : state_value<true>(tables[s], codes[s][e / 4], e % 4)) *
             absmax[s];
    else
      return floats[s][e];
  }
};

// ---- the step ----

// What a rule made of one element.
struct Stepped {
  float u, m[2], v, root;

  template <class Rule, bool kQuantized, bool kWide>
  __device__ Stepped(Rule, const StoredStates<Rule, kQuantized, kWide>& stored, const StateTable* tables, int e,
                     const Factors& f, float p, float g)
      : m{0.0f, 0.0f}, v(0.0f), root(0.0f) {
    using S = States<Rule>;
    UNROLL for (int s = 0; s < S::kCount; ++s) {
      const float value = stored.value(tables, s, e);
      if (!S::second(s)) {
        m[s] = value;
      } else if (kQuantized) {
        root = value;
        v = value * value;
      } else {
        v = value;
      }
    }
    u = Rule::template direction<Lane>(f, p, g * f.grad, m, v, root);
  }

  // State s as it is kept.
  template <class Rule, bool kQuantized>
  __device__ float kept(int s) const {
    return !States<Rule>::second(s) ? m[s] : kQuantized ? root : v;
  }
};

// ---- chunks ----

// What a thread block keeps from chunk to chunk, in shared memory.
template <class Rule>
struct Workplace {
  StateTable tables[States<Rule>::kSlots];
  Factors factors;
};

// One chunk, and what of the workplace is ready. All members are the same in every thread of the block.
struct Chunk {
  const OptimTensor* t;
  int64_t begin;  // its first block in the tensor
  int blocks;     // how many there are
  int32_t index;  // of the tensor
  int64_t count;  // of the tensor's elements
  bool packable, flat;
  double step;

  double factors_step = 0.0;  // of the factors in shared memory; 0: none yet
  int32_t factors_tensor = -1;
  bool filled = false;

  __device__ void enter(const OptimStep& s, int64_t chunk, int states) {
    index = s.chunks[chunk];
    t = s.tensors + index;
    step = *in_global(t->step);
    count = t->count;
    flat = t->row == count || t->row % kOptimBlock == 0;
    packable = aligned(*t, states);
    begin = (chunk - t->first_chunk) * kChunkBlocks;
    const int64_t end = index + 1 < s.tensor_count ? t[1].first_block : s.block_count;
    const int64_t left = end - t->first_block - begin;
    blocks = static_cast<int>(left < kChunkBlocks ? left : kChunkBlocks);
  }

  // Makes the tables and the factors that this chunk needs, unless they are there. sums: those of all tensors, or null.
  template <class Rule>
  __device__ void prepare(Rule, const OptimStep& s, Workplace<Rule>& place, const double* sums) {
    using S = States<Rule>;
    const bool fill = S::kCount > 0 && t->quantized && !filled;
    const bool derive = step != factors_step || (sums != nullptr && index != factors_tensor);
    if (!fill && !derive) return;
    __syncthreads();  // no warp is at the chunk before any more
    if (fill) {
      UNROLL for (int m = 0; m < S::kCount; ++m) fill_table(place.tables[m], kGpuMaps[m < Rule::kMoments]);
      filled = true;
    }
    if (derive) {
      if (threadIdx.x == 0)
        place.factors = factors_of(Rule::kRule, s.hyper, s.lr != nullptr ? *s.lr : s.hyper.lr, step, grad_factor(s),
                                   sums != nullptr ? sums + 2 * t->position : nullptr);
      factors_step = step;
      factors_tensor = index;
    }
    __syncthreads();
  }
};

// Loads of what the host may set between steps. The host cannot look into a table on the device: one that was made of
// other tensors ends the kernel, and the error is seen at the next synchronisation.
__device__ inline bool nothing_to_do(const OptimStep& s) {
  if (s.mark != nullptr && *s.mark != s.wanted_mark) TRAP();
  return s.found_inf != nullptr && *s.found_inf != 0.0f;
}

__device__ inline double warp_sum(double v) {
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

// ---- launches ----

template <class Kernel>
void launch_chunks(Kernel kernel, const OptimStep& s, int64_t begin, int64_t end, Stream stream) {
  if (begin == end) return;
  const int64_t most = resident_blocks(kernel, kStepThreads);
  const dim3 grid(static_cast<unsigned>(end - begin < most ? end - begin : most));
  LAUNCH(kernel, grid, dim3(kStepThreads), 0, stream, s, begin, end);
}

template <class Rule>
void launch_step(const OptimStep& s, Stream stream);
template <class Rule>
void launch_sums(const OptimStep& s, Stream stream);

}  // namespace octavo::GPU_NS
