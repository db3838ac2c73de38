#pragma once
// The sums over whole tensors that some rules need before they can step.
#include "optim8/work_gpu.h"

namespace octavo::GPU_NS {

template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void add_sums(Rule rule, const OptimTensor& t, const Factors& f, const StateTable* tables,
                                         const BlockPlace& place, int64_t block, double (&sums)[2]) {
  using L = Lanes<kWide>;
  float p[kEach], g[kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  if constexpr (Rule::kSums == Sums::norms) L::load_param(t, place, p);
  L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  if constexpr (Rule::kSecond) stored.load(t, place, block);
  if constexpr (Rule::kSums == Sums::ratio)
    if (lane_id() == 0) sums[1] += place.left;
  UNROLL for (int e = 0; e < kEach; ++e) {
    float other = g[e] * f.grad;
    if constexpr (Rule::kSums == Sums::ratio) {
      const float v = Stepped(rule, stored, tables, e, f, other, g[e]).v;  // which the parameter does not enter
      const float ratio = Rule::template ratio<Lane>(f, other, v);
      if (abs_bits(ratio) < kInfinity && v >= 0.0f && v < bits_float(kInfinity) &&
          L::offset(e, place.packed) < place.left)
        sums[0] += static_cast<double>(ratio);
      continue;
    }
    if constexpr (Rule::kSecond) other = Stepped(rule, stored, tables, e, f, p[e], g[e]).u;
    if (abs_bits(other) < kInfinity && L::offset(e, place.packed) < place.left) {
      sums[0] += static_cast<double>(p[e]) * static_cast<double>(p[e]);
      sums[1] += static_cast<double>(other) * static_cast<double>(other);
    }
  }
}

// Of each chunk.
template <class Rule, bool kWide>
__global__ void __launch_bounds__(kStepThreads, 3) chunk_sums_kernel(OptimStep s, int64_t begin, int64_t end) {
  SHARED(Workplace<Rule>, place, [1]);
  SHARED(double, parts, [2][kStepWarps][2]);
  if (nothing_to_do(s)) return;
  Chunk at;
  int phase = 0;
  NO_UNROLL for (int64_t chunk = begin + blockIdx.x; chunk < end; chunk += gridDim.x) {
    at.enter(s, chunk, States<Rule>::kCount);
    at.prepare(Rule{}, s, place[0], nullptr);
    const OptimTensor& t = *at.t;
    double sums[2] = {0.0, 0.0};
    NO_UNROLL for (int i = threadIdx.x / 32; i < at.blocks; i += kStepWarps) {
      const int64_t block = at.begin + i;
      const BlockPlace where(t, at.count, block, Lanes<kWide>::kPart, at.packable, at.flat);
      if (t.quantized)
        add_sums<Rule, true, kWide>(Rule{}, t, place[0].factors, place[0].tables, where, block, sums);
      else
        add_sums<Rule, false, kWide>(Rule{}, t, place[0].factors, place[0].tables, where, block, sums);
    }
    for (int i = 0; i < 2; ++i) {
      sums[i] = warp_sum(sums[i]);
      if (lane_id() == 0) parts[phase][threadIdx.x / 32][i] = sums[i];
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      double sum = 0.0;
      for (int warp = 0; warp < kStepWarps; ++warp) sum += parts[phase][warp][threadIdx.x];
      s.chunk_sums[2 * chunk + threadIdx.x] = sum;
    }
    phase ^= 1;
  }
}

template <class Rule>
void launch_sums(const OptimStep& s, Stream stream) {
  launch_chunks(chunk_sums_kernel<Rule, true>, s, 0, s.wide_chunks, stream);
  launch_chunks(chunk_sums_kernel<Rule, false>, s, s.wide_chunks, s.chunk_count, stream);
}

}  // namespace octavo::GPU_NS
