#pragma once
// The step of an optimizer on a GPU: a block of 256 elements by a warp.
#include <type_traits>

#include "optim8/work_gpu.h"

namespace octavo::GPU_NS {

// Of these states NaN and Inf are looked for, and in the direction: they come from a gradient that is, or whose square
// is, from 0 / 0 without an eps, from a weight that is. Elements where one is found are left alone.
template <class Rule>
HD constexpr bool checked(int s) {
  return States<Rule>::second(s) || !Rule::kSecond || (Rule::kMoments == 2 && s == 1);
}

// Puts back what must be left alone, and makes `most` what it is without. Nothing has been written yet: the old values
// are read again, so that the usual path need not keep them.
template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void leave_alone(Rule rule, const OptimStep& s, const OptimTensor& t, const Factors& f,
                                            const StateTable* tables, const BlockPlace& place, int64_t block,
                                            float (&p)[kEach], float (&state)[States<Rule>::kSlots][kEach],
                                            uint32_t (&most)[States<Rule>::kSlots]) {
  using S = States<Rule>;
  using L = Lanes<kWide>;
  float before[kEach], g[kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  L::load_param(t, place, before);
  L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  stored.load(t, place, block);
  int left_alone = 0;
  UNROLL for (int e = 0; e < kEach; ++e) {
    bool valid = abs_bits(Stepped(rule, stored, tables, e, f, before[e] * f.shrink, g[e]).u) < kInfinity;
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      if (checked<Rule>(i)) valid &= abs_bits(state[i][e]) < kInfinity;
      if (S::second(i)) valid &= state[i][e] >= 0.0f;  // v below 0 has no root
    }
    if (valid) continue;
    p[e] = before[e];
    UNROLL for (int i = 0; i < S::kCount; ++i) state[i][e] = stored.value(tables, i, e);
    if (L::offset(e, place.packed) < place.left) ++left_alone;
  }
  if constexpr (kQuantized) {
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      float largest = left_alone > 0 ? stored.absmax[i] : 0.0f;  // what is left alone keeps its code
      UNROLL for (int e = 0; e < kEach; ++e) largest =
          fmaxf(largest, S::second(i) ? state[i][e] : reach_of(state[i][e]));
      most[i] = float_bits(largest);
    }
  }
  if (left_alone > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(s.nonfinite), static_cast<unsigned long long>(left_alone));
}

template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void step_block(Rule rule, const OptimStep& s, const OptimTensor& t, const Factors& f,
                                           const StateTable* tables, const BlockPlace& place, int64_t block,
                                           uint32_t key, uint32_t dither) {
  using S = States<Rule>;
  using L = Lanes<kWide>;
  float p[kEach], g[kEach], state[S::kSlots][kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  L::load_param(t, place, p);
  L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  stored.load(t, place, block);

  // The largest magnitudes, as integers, which do not lose a NaN, where one is looked for; of roots, their sign is
  // known.
  uint32_t most[S::kSlots] = {}, worst = 0;
  UNROLL for (int e = 0; e < kEach; ++e) {
    const float shrunk = p[e] * f.shrink;
    const Stepped next(rule, stored, tables, e, f, shrunk, g[e]);
    p[e] = fmaf(-f.size, next.u, shrunk);
    worst = max(worst, abs_bits(next.u));
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      state[i][e] = next.template kept<Rule, kQuantized>(i);
      if (S::second(i))
        most[i] = max(most[i], float_bits(next.root));
      else if (checked<Rule>(i))
        most[i] = max(most[i], abs_bits(kQuantized ? reach_of(state[i][e]) : state[i][e]));
      else if (kQuantized)
        most[i] = float_bits(fmaxf(bits_float(most[i]), reach_of(state[i][e])));
    }
  }

  UNROLL for (int i = 0; i < S::kCount; ++i) {
    if (checked<Rule>(i)) worst = max(worst, most[i]);
  }
  if (worst >= kInfinity) leave_alone<Rule, kQuantized, kWide>(rule, s, t, f, tables, place, block, p, state, most);

  L::store_param(t, place, p, s.stochastic, key);
  __syncwarp();  // every lane has read the absmax that lane 0 replaces
  UNROLL for (int i = 0; i < S::kCount; ++i) {
    if constexpr (kQuantized) {
      const float absmax = block_absmax(bits_float(warp_max(most[i])));
      const float inverse = block_inverse(absmax);
      if (lane_id() == 0) in_global(t.absmax[i])[block] = absmax;
      UNROLL for (int e = 0; e < kEach; ++e) state[i][e] *= inverse;
      uint32_t words[kEach / 4], random[kEach];
      const uint32_t step = place.packed ? kDitherStep : 32 * kDitherStep;  // to the next of `part` elements
      UNROLL for (int part = 0; part < kEach; part += L::kPart) {
        uint32_t at = computed(dither + dither_key(0, 0, i) + static_cast<uint32_t>(place.mine) * kDitherStep +
                               32 * part * kDitherStep);
        UNROLL for (int e = part; e < part + L::kPart; ++e, at = computed(at + step)) random[e] = at;
      }
      if (S::second(i))
        state_codes<false>(tables[i], state[i], random, words);
      else
        state_codes<true>(tables[i], state[i], random, words);
      L::template store<uint8_t>(t.state[i], place, words);
    } else {
      L::template store<float>(t.state[i], place, state[i]);
    }
  }
}

template <class Rule, bool kWide>
__global__ void __launch_bounds__(kStepThreads, 2) optim_step_kernel(OptimStep s, int64_t begin, int64_t end) {
  SHARED(Workplace<Rule>, place, [1]);
  if (nothing_to_do(s)) return;
  Chunk at;
  NO_UNROLL for (int64_t chunk = begin + blockIdx.x; chunk < end; chunk += gridDim.x) {
    at.enter(s, chunk, States<Rule>::kCount);
    at.prepare(Rule{}, s, place[0], Rule::kSums == Sums::none ? nullptr : s.sums);
    const OptimTensor& t = *at.t;
    // In registers, but where three states take them all.
    const std::conditional_t<(Rule::kMoments > 1), const Factors&, const Factors> f = place[0].factors;
    const uint32_t dither = dither_key(t.id, at.step, 0);
    uint32_t key = 0;
    if (!kWide && s.stochastic) key = random_key(s.seed, t.id, at.step);
    NO_UNROLL for (int i = threadIdx.x / 32; i < at.blocks; i += kStepWarps) {
      const int64_t block = at.begin + i;
      const BlockPlace where(t, at.count, block, Lanes<kWide>::kPart, at.packable, at.flat);
      if (t.quantized)
        step_block<Rule, true, kWide>(Rule{}, s, t, f, place[0].tables, where, block, key, dither);
      else
        step_block<Rule, false, kWide>(Rule{}, s, t, f, place[0].tables, where, block, key, dither);
    }
  }
}

template <class Rule>
void launch_step(const OptimStep& s, Stream stream) {
  launch_chunks(optim_step_kernel<Rule, true>, s, 0, s.wide_chunks, stream);
  launch_chunks(optim_step_kernel<Rule, false>, s, s.wide_chunks, s.chunk_count, stream);
}

}  // namespace octavo::GPU_NS
